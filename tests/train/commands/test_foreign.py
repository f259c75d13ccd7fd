"""No command of cogtrain changes a byte of what is not its own, whatever lies in its folder."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from foreign_trees import Tree

from cogcommon.errors import CogError, SettingError
from cogcommon.files.atomic import commit_bytes
from cogcommon.files.failures import machines_fault
from cogcommon.files.ownership import replace_folder, take_output
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import Resolution
from cogtrain.commands import export, generate
from cogtrain.distributed.peers import ALONE
from cogtrain.model.sft import A_TRANSFORMER
from cogtrain.report.card import write_card
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.runs.claim import claimed
from cogtrain.runs.folder import RunFacts, StepLine
from cogtrain.runs.log import RunLog, cut_metrics
from cogtrain.runs.saving import NotSaved, begin_saving
from cogtrain.settings.results import GenerateSettings
from cogtrain.validation.pipeline import Request
from cogtrain.validation.tuned import AppliedLora, Tuned

NAMES = (
    "README.md", "config.toml", "facts.json", "metrics.jsonl", "report.html", "validation", "checkpoint-1",
    "checkpoint-1/state.json", "checkpoint-3/weights.safetensors",
    "checkpoint-3/state/mp_rank_00_model_states.pt", "checkpoint-2/notes.txt", "checkpoint-3/state.json",
    "checkpoint-9/mine", ".checkpoint-4.tmp/mine", ".mine.tmp", ".cogtune.json", "transformer",
    "transformer/config.json", "transformer/notes.txt", "pytorch_lora_weights.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "tuned.mp4", "base.mp4", "side-by-side.mp4", "contact-sheet.png", "prompts.txt",
    "videos.txt", ".lock", "validation/step-000002/0.mp4", "exported/diffusers/README.md",
)  # fmt: skip

FACTS = RunFacts(
    "tiny", None, "5b", "t2v", "lora", "c" * 64, "s" * 64, 1, {"17x64x96": 4}, 0, 3, 1, 1, "ddp", "fp32", "CPU", 10, "1"
)


class OneRank:
    main = sharded = True
    peers = ALONE
    all_reduce_max = ALONE.all_reduce_max

    def snapshot(self, *_state) -> None:
        """As with DeepSpeed, which writes the files itself."""

    def save_state(self, _model, _snapshot, folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(bytes([2, *bytes(7)]) + b"{}" + folder.name.encode())
        (folder / "state").mkdir()
        (folder / "state" / "mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04rank")


def recorded(folder: Path) -> SimpleNamespace:
    """What a card needs of the run in a folder."""
    return SimpleNamespace(folder=folder, facts=FACTS, steps=[], validations=[], settings={}, exported=3)


def train_in(folder: Path, full: bool = False) -> None:
    """What a run of three steps does to its folder, resumed where it can be."""
    whole = checkpoints.list_checkpoints(folder)
    done = checkpoints.find_checkpoint(folder).state.step if whole else 0
    with claimed(folder) as made:
        made.set_aside("config.toml")
        made.commit_bytes("config.toml", b'# cogtrain lora --config run/config.toml\nmodel = "tiny"\n')
        cut_metrics(folder, done)
        checkpoints.clear(folder, after=done)
        FACTS.write(folder)
        log = RunLog(folder, 3, done)
        for step in range(done + 1, done + 4):
            log.write(dataclasses.asdict(StepLine(step, 0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0)))
            state = checkpoints.RunState(step, 1, {}, {})
            begin_saving(OneRank(), None, None, None, state, folder).end()
            checkpoints.prune(folder, keep=2, best=None)
        if full:
            scratch = folder / ".transformer.scratch"
            scratch.mkdir()
            (scratch / "config.json").write_bytes(b"{}")
            replace_folder(scratch, folder / "transformer", A_TRANSFORMER)
        write_card(folder, recorded(folder), "lora", 3)


@pytest.fixture(autouse=True)
def _finite(monkeypatch) -> None:
    """There are no weights to look at."""
    monkeypatch.setattr("cogtrain.runs.saving._check_finite", lambda *_: None)


@pytest.fixture
def generate_in(tmp_path, monkeypatch) -> Callable:
    """generate_in(folder or None, **settings): the command, with drawn frames in place of a model's."""
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    checkpoint = open_checkpoint("tiny")
    tuned = Tuned(checkpoint, (AppliedLora(tmp_path / "lora.safetensors"),), None, [checkpoint.native])
    tuned.loras[0].file.write_bytes(b"weights")

    def requests(settings, _tuned) -> list[Request]:
        resolution = Resolution.parse(settings.resolution or "17x64x96")
        rest = settings.steps, settings.guidance, settings.seed, 226, True
        return [Request(prompt, None, resolution, *rest) for prompt in settings.prompt]

    replaced = {
        "find_tuned": lambda *_: tuned, "requests_of": requests, "load_pipeline": lambda *_: None,
        "move_pipeline": lambda *_: None,
        "generate_video": lambda *_: frames, "to_base": lambda *_: None, "step_bytes": lambda *_: 0,
    }  # fmt: skip
    for name, function in replaced.items():
        monkeypatch.setattr(generate, name, function)

    def run(folder: Path | None, **settings) -> None:
        generate.run(GenerateSettings(**{"prompt": ["a cat"], "out": folder, "json": True} | settings))

    return run


@pytest.fixture
def ours(tmp_path, generate_in):
    """Folders that cogtrain made."""
    folders = [tmp_path / name for name in ("run", "full", "videos", "export", "older")]
    train_in(folders[0])
    train_in(folders[1], full=True)
    generate_in(folders[2])
    export_to(folders[3])
    shutil.copytree(folders[0], folders[4], ignore=shutil.ignore_patterns(".cogtune.json", ".lock"))
    return folders


def export_to(folder: Path) -> None:
    """What an export does to its folder."""
    made = take_output(folder, export._EXPORT, "--out")
    files = export._files("diffusers", recorded(folder), 3)
    made.open(*files)
    for name in files:
        commit_bytes(folder / name, b"weights")
    made.close(*files)
    write_card(folder, recorded(folder), "lora", 3)


def let_loose(trees: int, seed: int, ours, generate_in, tmp_path) -> None:
    draw = random.Random(seed)
    refused = 0
    for number in range(trees):
        folder = tmp_path / "here"
        tree = Tree(folder, ours, NAMES, draw)
        run = draw.choice([train_in, lambda top: train_in(top, full=True), generate_in, export_to])
        try:
            run(tree.top)
        except (CogError, NotSaved):
            refused += 1
        except OSError as error:  # as the command line takes it
            assert machines_fault(error), tree.told()
            refused += 1
        # Two are read by their names, the settings and the tuned transformer: what lies there moves aside.
        lost = [
            path
            for path in tree.touched()
            if ("transformer" not in path.parts[-2:-1] and path.name != "config.toml") or not tree.moved_aside(path)
        ]
        assert not lost, f"tree {number} of seed {seed}: {lost} in {tree.told()}"
        shutil.rmtree(folder)
    assert 0 < refused < trees


def test_what_is_somebodys_stays_as_it_is(ours, generate_in, tmp_path, capsys):
    let_loose(100, 1, ours, generate_in, tmp_path)


@pytest.mark.full
def test_what_is_somebodys_stays_as_it_is_in_thousands_of_trees(ours, generate_in, tmp_path, capsys):
    let_loose(3300, 2, ours, generate_in, tmp_path)


def test_a_run_takes_no_folder_of_somebodys(tmp_path):
    for name in ("README.md", "metrics.jsonl", "src/main.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(SettingError, match="did not make"), claimed(tmp_path):
            pass
        assert (tmp_path / name).read_text() == "mine" and not (tmp_path / ".cogtune.json").exists()
        (tmp_path / name).unlink()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(SettingError, match="data root"), claimed(tmp_path):
        pass


def test_several_prompts_take_no_data_root_either(generate_in, tmp_path):
    (tmp_path / "videos.txt").write_text("a.mp4")
    with pytest.raises(SettingError, match="data root"):
        generate_in(tmp_path, prompt=["a cat", "a dog"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_card_and_settings_that_somebody_edits_are_kept(tmp_path):
    run = tmp_path / "run"
    train_in(run)
    for name in ("README.md", "config.toml"):
        (run / name).write_text((run / name).read_text() + "# mine")
    train_in(run)
    assert (run / "README.md").read_text().endswith("# mine")
    assert (run / "config-yours.toml").read_text().endswith("# mine")
    assert not (run / "config.toml").read_text().endswith("# mine")


def test_a_checkpoint_that_goes_leaves_what_somebody_put_into_it(tmp_path):
    run = tmp_path / "run"
    train_in(run)
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["checkpoint-2", "checkpoint-3"]
    (run / "checkpoint-2" / "state" / "notes.txt").write_text("mine")
    (run / "checkpoint-99").mkdir()  # no state in it: not whole, and not ours
    (run / "checkpoint-99" / "mine").write_text("mine")
    train_in(run)
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]
    assert [path.name for path in (run / "checkpoint-2").rglob("*")] == ["state", "notes.txt"]
    assert (run / "checkpoint-99" / "mine").exists()


def test_each_request_has_a_folder_of_its_own(generate_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = [
        {"prompt": ["一只猫在跑"]}, {"prompt": ["一只狗在睡觉"]}, {"prompt": ["собака бежит"]},
        {"prompt": ["кошка спит"]},
        {"prompt": ["a photo of a red dog running on a beach at sunset"]}, {"prompt": ["!"]}, {"prompt": ["?"]},
        {"prompt": ["a photo of a red dog running on a beach, asleep"]}, {"steps": 10}, {"guidance": 3.0},
        {"resolution": "9x64x96"}, {"seed": 7}, {"fps": 4.0}, {"base": False}, {},
    ]  # fmt: skip
    for settings in asked:
        generate_in(None, **settings)
    folders = sorted((tmp_path / "generated").iterdir())
    assert len(folders) == len(asked)
    assert any("一只猫在跑" in folder.name for folder in folders)
    generate_in(None, **asked[0])  # the same video again
    assert sorted((tmp_path / "generated").iterdir()) == folders


def test_a_folder_with_another_video_is_not_written_over(generate_in, tmp_path, capsys):
    out = tmp_path / "videos"
    generate_in(out)
    before = (out / "tuned.mp4").read_bytes()
    with pytest.raises(SettingError, match="another prompt"):
        generate_in(out, prompt=["a dog"])
    generate_in(out)
    assert (out / "tuned.mp4").read_bytes() == before
    (out / "base.mp4").write_bytes(b"mine")
    with pytest.raises(SettingError, match="not as we made it"):
        generate_in(out)
    assert json.loads((out / ".cogtune.json").read_text())["by"] == "generated videos"


def test_a_run_of_before_there_were_records_goes_on(ours):
    older = ours[4]
    train_in(older)
    assert [path.name for path in checkpoints.list_checkpoints(older)] == ["checkpoint-5", "checkpoint-6"]
    assert not (older / "checkpoint-3").exists()
