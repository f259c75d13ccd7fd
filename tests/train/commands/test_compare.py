"""compare: checkpoints and strengths beside one another and the base model, as generate would draw each."""

import json
import re
import signal

import av
import numpy as np
import pytest
import torch
from forked import Forked
from in_process import OneCommand
from PIL import Image

from cogcommon.files.ownership import Made
from cogcommon.media.video import read_mp4
from cogcommon.model.families import Resolution
from cogtrain.commands import compare, generate
from cogtrain.commands.compare import Cell, layout
from cogtrain.report.sheet import Column, grid
from cogtrain.report.videos import VideoFolder
from cogtrain.runs.folder import COMPARED, CONFIG_FILE, GENERATED, REPORT_FILE
from cogtrain.settings.results import CompareSettings, GenerateSettings
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.validation.pipeline import Request, generate_video, load_pipeline, to_base
from cogtrain.validation.tuned import find_tuned

SMALL = ["--steps", "1", "--resolution", "9x64x96", "--seed", "7"]


command = OneCommand("compare", CompareSettings, compare.run)
fault = command.fault


@pytest.fixture
def make_run(tmp_path, make_shards, train_here):
    def make(cls, **settings):
        make_shards(tmp_path / "out", samples=4)
        return train_here(cls(shards=[str(tmp_path / "out")], out=tmp_path / "run", steps=2, save_every=1, **settings))

    return make


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn, by label, for the first prompt."""
    found, real = {}, VideoFolder.add

    def keep(folder, name, frames):
        found.setdefault(name, frames)
        real(folder, name, frames)

    monkeypatch.setattr(VideoFolder, "add", keep)
    return found


def test_each_cell_is_what_generate_draws_of_these_weights(make_run, drawn):
    run = make_run(LoraSettings, rank=4, alpha=64.0, lr=0.1)  # strong enough to be seen after two steps
    done = command(run, "--checkpoints", "1,last", "--strengths", "0.5", "--prompt", "a ball", *SMALL)
    assert done.exception is None, done.output
    assert list(drawn) == ["base model", "step 1 at 0.5", "step 2 at 0.5", "grid"]
    assert len({frames.tobytes() for frames in drawn.values()}) == 4
    assert "trained for 5b, and tiny-2b is 2b" in fault(run, "--model", "tiny-2b", "--prompt", "a ball", *SMALL)
    request = Request("a ball", None, Resolution(9, 64, 96), 1, 6.0, 7, 226, True)
    tuned = find_tuned(run, [], None, None, 0.5)
    pipeline = load_pipeline(tuned, torch.float32)
    assert (generate_video(pipeline, request, lambda: None) == drawn["step 2 at 0.5"]).all()
    to_base(pipeline, tuned, torch.float32)
    assert (generate_video(pipeline, request, lambda: None) == drawn["base model"]).all()

    words = ("--run", run / "checkpoint-1", "--strength", "0.5", "--no-base", "--prompt", "a ball", *SMALL)
    one = OneCommand("generate", GenerateSettings, generate.run)(*words)  # of a checkpoint, beside the run's own videos
    assert one.exception is None and (drawn["tuned"] == drawn["step 1 at 0.5"]).all()
    assert [path.name for path in (run / GENERATED).iterdir()] and not (run / "checkpoint-1" / GENERATED).exists()
    assert "checkpoints were named twice" in fault(run / "checkpoint-1", "--checkpoints", "2", "--prompt", "a ball")
    told = fault(run / "checkpoint-1", "--strengths", "strong", "--prompt", "a ball")
    assert "these are no strengths" in told  # so that its checkpoint was found
    (run / "ds").mkdir()
    (run / "ds/prompts.txt").write_text("a cat")
    assert "this folder is a data root" in fault(run, "--out", run / "ds", "--prompt", "a ball", *SMALL)

    (first,) = (run / COMPARED).iterdir()
    assert first.name.startswith("a-ball-7-")
    with av.open(str(first / "grid.mp4")) as video:
        assert video.streams.video[0].frames == 9
    read = read_mp4(first / "step-2-at-0.5.mp4")
    far = {name: np.abs(read.astype(int) - frames).mean() for name, frames in drawn.items() if name != "grid"}
    assert min(far, key=far.get) == "step 2 at 0.5" and far["step 2 at 0.5"] < 8  # noise, of which H.264 keeps less
    made = Made.read(first)
    assert made and made.owns("grid.mp4") and made.owns("base-model.mp4") and made.owns("contact-sheet.png")
    assert json.loads(made.request)["prompt"] == "a ball"
    assert Image.open(first / "contact-sheet.png").width > 1000
    assert f'src="compared/{first.name}/grid.mp4"' in (run / REPORT_FILE).read_text()
    assert str(run / REPORT_FILE) in done.stdout
    made = Made.read(run)
    assert made and made.owns(REPORT_FILE) and made.files[REPORT_FILE]  # a later change of it is somebody's

    (first / "grid.mp4").write_bytes(b"mine")
    assert "best needs a run with --validate-shards" in fault(run, "--checkpoints", "1,best", "--prompt", "a ball")
    assert "not as we made it" in fault(run, "--checkpoints", "1,2", "--strengths", "0.5", "--prompt", "a ball",
                                        *SMALL)  # fmt: skip
    assert "there is no checkpoint '3'" in fault(run, "--checkpoints", "1,3", "--prompt", "a ball")
    assert "no strengths" in fault(run, "--strengths", "1,strong", "--prompt", "a ball")
    assert "there is no prompt" in fault(run)
    assert "red ball" in fault(run, "--prompt", "a", "red", "ball")  # a sentence without its quotes


def test_stopped_it_keeps_what_is_drawn_and_the_same_command_makes_the_rest(make_run, monkeypatch):
    """What is drawn is not the point here: each video is of one grey."""
    run = make_run(LoraSettings, rank=4, lr=0.1)
    words = (run, "--prompt", "a ball", "--prompt", "a cube", *SMALL)
    calls = []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return np.full((9, 64, 96, 3), 15 * len(calls), np.uint8)

    monkeypatch.setattr(compare, "generate_video", stopping)
    stopped = command(*words)
    assert "3 of 6 videos drawn; run the same command again" in stopped.output + str(stopped.exception)
    there = sorted(path.relative_to(run / COMPARED).name for path in (run / COMPARED).glob("*/*.mp4"))
    assert there == ["base-model.mp4", "base-model.mp4", "step-1.mp4"]
    done = command(*words)
    assert done.exception is None, done.output
    assert len(calls) == 7 and len(list((run / COMPARED).glob("*/*.mp4"))) == 8
    assert command(*words).exception is None and len(calls) == 13  # all of it was there: drawn anew


def test_a_scheduler_that_stops_it_gets_its_code_and_a_person_the_way_on(make_run, tmp_path):
    run = make_run(LoraSettings, rank=4)
    stopping = tmp_path / "stopping.py"
    stopping.write_text(
        "import os, signal, cogtrain.commands.compare as compare\n"
        "compare.generate_video = lambda *_arguments: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from cogtrain.cli import main\n"
        "if __name__ == '__main__': main()\n"
    )
    code, _, said = Forked([stopping, "compare", run, "--prompt", "a ball", *SMALL]).end()
    assert code == 128 + signal.SIGTERM
    assert "stopped; 0 of 3 videos drawn; run the same command again to have the rest" in said
    assert "Traceback" not in said


@pytest.mark.full
def test_full_fine_tuning_has_a_transformer_for_each_checkpoint(make_run, drawn):
    run = make_run(SftSettings, lr=1e-3)
    assert "no strength" in fault(run, "--strengths", "0.5", "--prompt", "a ball")
    assert command(run, "--prompt", "a ball", "--prompt", "a cube", *SMALL).exception is None
    assert [path.name[:9] for path in sorted((run / COMPARED).iterdir())] == ["a-ball-7-", "a-cube-7-"]
    request = Request("a ball", None, Resolution(9, 64, 96), 1, 6.0, 7, 226, True)
    pipeline = load_pipeline(find_tuned(run, [], None, None), torch.float32)
    assert (generate_video(pipeline, request, lambda: None) == drawn["step 2"]).all()
    pipeline = load_pipeline(find_tuned(run / "checkpoint-1", [], None, None), torch.float32)
    assert (generate_video(pipeline, request, lambda: None) == drawn["step 1"]).all()
    assert (drawn["step 1"] != drawn["step 2"]).any() and (drawn["step 1"] != drawn["base model"]).any()


def test_without_a_prompt_it_draws_those_that_the_run_was_watched_by(make_run, drawn):
    run = make_run(LoraSettings, rank=4)
    assert "there is no prompt" in fault(run, *SMALL)
    config = run / CONFIG_FILE
    config.write_text(
        re.sub(r"(?m)^#? *validate_prompt\b.*$", "", config.read_text()) + '\nvalidate_prompt = ["a ball"]\n'
    )
    done = command(run, "--checkpoints", "last", "--json", *SMALL)
    assert done.exception is None and [one["prompt"] for one in json.loads(done.stdout)["videos"]] == ["a ball"]


def test_one_step_lays_its_strengths_side_by_side():
    assert layout([200, 400], [0.6, 1.0]) == [
        [Cell(0), Cell(200, 0.6, "step 200 at 0.6"), Cell(400, 0.6, "step 400 at 0.6")],
        [None, Cell(200, 1.0, "step 200 at 1"), Cell(400, 1.0, "step 400 at 1")],
    ]
    assert [[cell.label for cell in row] for row in layout([400], [0.6, 1.0])] == [
        ["base model", "step 400 at 0.6", "step 400 at 1"]
    ]
    assert layout([400], [1.0]) == [[Cell(0), Cell(400, 1.0, "step 400")]]


def test_a_grid_holds_each_video_in_its_place():
    def video(level):
        return np.full((2, 32, 48, 3), level, np.uint8)

    shown = grid([[Column("base model", video(0)), Column("a", video(80))], [None, Column("b", video(160))]])
    assert shown.shape[0] == 2 and shown.shape[1] % 2 == shown.shape[2] % 2 == 0 and 1200 < shown.shape[2] < 1320
    height, width = shown.shape[1:3]
    at = lambda y, x: int(shown[1, int(height * y), int(width * x), 0])  # noqa: E731
    assert (at(0.4, 0.25), at(0.4, 0.75), at(0.9, 0.75)) == (0, 80, 160)
    assert at(0.9, 0.25) > 240  # nothing below the base model
