"""Videos of a person's own prompts in training (--validate-prompt): drawn as `cogtrain generate` draws them."""

import functools
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from forked import ForkedRanks
from PIL import Image

from cogcommon.cli.settings import resolve
from cogcommon.errors import ModelError, RunError, SettingError
from cogcommon.files.memory import Headroom
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.device import dtype_of
from cogcommon.model.families import Resolution
from cogcommon.model.text_encoder import TextEncoder
from cogtrain.commands import generate
from cogtrain.data.batches import read_sample
from cogtrain.data.prompts import SEED, Prompt, lacking_token, without_token
from cogtrain.data.shard_set import ShardSet
from cogtrain.data.shards import open_shards
from cogtrain.memory import ready
from cogtrain.memory.disk import writes
from cogtrain.memory.ready import check_ready
from cogtrain.memory.weights import text_encoder_bytes
from cogtrain.runs.folder import drawn_prompts, embedding_file
from cogtrain.runs.opening import open_run
from cogtrain.settings.results import GenerateSettings
from cogtrain.settings.training import LoraSettings
from cogtrain.validation.videos import denoise

SMALL = (Resolution(9, 32, 48),)
PICTURE = Path("none.png")
RED, BLUE = "A red ball rolls to the left.", "青い 球"


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(int)


@pytest.fixture(autouse=True)
def two_sampling_steps(monkeypatch):
    monkeypatch.setattr("cogtrain.validation.drawing.denoise", functools.partial(denoise, steps=2))


@pytest.fixture
def given(tmp_path, make_shards):
    make_shards(tmp_path / "shards", samples=2, resolutions=SMALL)
    return {"shards": [str(tmp_path / "shards")], "out": tmp_path / "run", "rank": 4, "lr": 1e-2}


def test_a_prompt_is_drawn_as_generate_draws_it(tmp_path, given, train_here, monkeypatch, capsys):
    """Base and tuned, with no held-out shards; in the report, and in the card."""
    text = TextEncoder(open_checkpoint("tiny"), torch.device("cpu"), torch.float32).encode("")[0]
    empty = safetensors.torch.save({"text": text.clone()})
    monkeypatch.setattr(ShardSet, "empty_caption", lambda self: empty)
    run = train_here(LoraSettings(**given, steps=2, validate_prompt=[RED, BLUE, RED]))
    names = {text: name for name, text in drawn_prompts(run).items()}
    assert list(names) == [RED, BLUE]
    for step in (0, 2):
        drawn = sorted(path.stem for path in (run / f"validation/step-{step:06d}").iterdir())
        assert drawn == sorted(names.values())
    assert not [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line]

    assert GenerateSettings().seed == SEED
    generate.run(GenerateSettings(run=run, prompt=[RED], steps=2, out=tmp_path / "generated"))
    for theirs, step in (("base", 0), ("tuned", 2)):
        mine = frames_of(run / f"validation/step-{step:06d}/{names[RED]}.mp4")
        assert mine.shape == (9, 32, 48, 3)
        assert np.abs(mine - frames_of(tmp_path / f"generated/{theirs}.mp4")).mean() < 0.1
    base, tuned = (frames_of(run / f"validation/step-{step:06d}/{names[RED]}.mp4") for step in (0, 2))
    assert np.abs(base - tuned).mean() > 1

    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Prompts</h2>" in page and "Held-out" not in page
    assert page.index(RED) < page.index(f"step-000000/{names[RED]}.mp4") < page.index(f"step-000002/{names[RED]}.mp4")
    assert RED in (run / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "validation: 2 prompts; base model first" in capsys.readouterr().out


def test_a_resume_needs_no_t5_but_for_new_prompts(tmp_path, given, train_here, monkeypatch, capsys):
    run = train_here(LoraSettings(**given, steps=1, validate_prompt=[RED]))
    (red,) = drawn_prompts(run)
    base = run / f"validation/step-000000/{red}.mp4"
    written = base.stat().st_mtime_ns
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load_text_encoder", lambda *_: pytest.fail("T5 was loaded"))
        train_here(LoraSettings(**given, steps=2, validate_prompt=[RED]))
        assert (run / f"validation/step-000002/{red}.mp4").is_file() and base.stat().st_mtime_ns == written
        patch.undo()
    loaded, load = [], Checkpoint.load_text_encoder
    monkeypatch.setattr(Checkpoint, "load_text_encoder", lambda *given: loaded.append(given) or load(*given))
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"\n{BLUE}\n", encoding="utf-8")
    train_here(LoraSettings(**given, steps=3, validate_prompts=lines))
    assert len(loaded) == 1 and "changed since" not in capsys.readouterr().out
    (blue, _), shown = drawn_prompts(run), (run / "report.html").read_text(encoding="utf-8")
    assert drawn_prompts(run) == {blue: BLUE, red: RED}  # what was drawn before is still shown
    assert {path.stem for path in (run / "validation/step-000003").iterdir()} == {blue}
    assert (run / f"validation/step-000000/{blue}.mp4").is_file() and f"step-000002/{red}.mp4" in shown
    assert resolve(LoraSettings, {}, run / "config.toml").validate_prompts == lines


def test_prompts_go_through_the_runs_settings_as_they_were_typed(tmp_path, given, train_here, capsys):
    """Quotes, line breaks and odd characters; and what T5 does not read is said."""
    odd = 'She says "no\\n",\nthen\x7f é\u2028 ' + "and walks on " * 100
    run = train_here(LoraSettings(**given, steps=1, validate_prompt=[odd]))
    assert resolve(LoraSettings, {}, run / "config.toml").validate_prompt == [odd]
    assert 'note: --validate-prompt "She says' in (said := capsys.readouterr().out) and "this is lost" in said
    assert "1 prompt;" in said


@pytest.mark.full  # 20 s
def test_two_processes_share_the_prompts(tmp_path, given, train_here, monkeypatch):
    """Rank 0 embeds, each draws one; what they draw is what one process draws."""
    monkeypatch.setattr("cogtrain.validation.drawing.denoise", denoise)  # as other processes have it
    one = train_here(LoraSettings(**given, steps=1, batch_size=2, validate_prompt=[RED, BLUE]))
    words = ["cogtrain", "lora", "--shards", *given["shards"], "--rank", 4, "--lr", 1e-2, "--steps", 1]
    words += ["--validate-prompt", RED, "--validate-prompt", BLUE, "--out", tmp_path / "two"]
    ended = ForkedRanks(2, words, tmp_path).end()
    assert all(code == 0 for code, *_ in ended), ended
    assert list(drawn_prompts(one)) == list(drawn_prompts(tmp_path / "two"))
    for video in sorted((one / "validation").glob("step-*/*.mp4")):
        theirs = tmp_path / "two" / video.relative_to(one)
        assert np.abs(frames_of(video) - frames_of(theirs)).mean() < 0.1


def test_what_t5_needs_is_asked_before_training(tmp_path, given, monkeypatch):
    for precision in ("fp32", "bf16"):
        model = open_checkpoint("tiny").load_text_encoder(dtype_of(precision))
        loaded = sum(weight.nbytes for weight in model.parameters())
        assert text_encoder_bytes(model.config.to_dict(), precision) == loaded
    shutil.copytree(open_checkpoint("tiny").root, tmp_path / "model")
    settings = LoraSettings(**given, steps=1, validate_prompt=[RED], model=str(tmp_path / "model"))
    run = open_run(settings, torch.device("cpu"), 1)
    (prompt,) = run.prompts
    assert prompt.size in run.validated_buckets  # so that the memory plan has it
    assert writes(run).prompts == 4 * run.checkpoint.family.text_tokens * model.config.d_model
    monkeypatch.setattr(ready, "host_memory_left", lambda: Headroom(0, "a test"))
    monkeypatch.setattr(ready, "check_host_memory", lambda *_: None)
    with pytest.raises(RunError, match="T5, which embeds the prompts of --validate-prompt, takes"):
        check_ready(run, 2)
    (tmp_path / "model/text_encoder/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors: T5, which embeds the prompts of --validate-prompt"):
        open_run(settings, torch.device("cpu"), 1)


def test_a_prompt_without_the_word_of_the_captions_is_told(tmp_path):
    prompts = [Prompt(text, text, None, SMALL[0]) for text in ("sks runs", "a dog", "a cat")]
    assert without_token(prompts, "") == without_token(prompts[:1], "sks") == []
    (note,) = without_token(prompts, "sks")
    assert "begins with 'sks'" in note and '"a dog" and 1 more' in note
    assert (lacking_token(["a dog"], ""), lacking_token(["a sks dog"], "sks")) == ("", "")


def test_one_pass_draws_held_out_captions_and_prompts_from_first_frames(tmp_path, make_shards, train_here):
    """Each prompt has its own; the encoder's latent of it is what the transformer gets; clips look as they were."""
    form = "tiny-1.5-i2v"
    make_shards(tmp_path / "shards", form, samples=1, resolutions=SMALL)
    make_shards(tmp_path / "held", form, samples=1, resolutions=SMALL, seed=9, captions=("a",))
    images = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path, colour in zip(images, ((200, 30, 30), (30, 30, 200)), strict=True):
        Image.new("RGB", (300, 200), colour).save(path)
    given = {"shards": [str(tmp_path / "shards")], "validate_shards": [str(tmp_path / "held")], "rank": 4}
    prompts = {"validate_prompt": [RED, RED], "validate_image": images, "validate_videos": 1}
    run = train_here(LoraSettings(**given, **prompts, steps=1, out=tmp_path / "run"))
    assert resolve(LoraSettings, {}, run / "config.toml").validate_image == images
    names = list(drawn_prompts(run))
    assert len(names) == 2
    assert {path.stem for path in (run / "validation/step-000001").iterdir()} == {"0", *names}
    vae = open_checkpoint(form).load_vae(torch.float32)
    stored = read_sample(open_shards(given["validate_shards"]), 0).latent_mean[None]
    shown = frames_of(run / "validation/clips/0.mp4")

    def distance(latent):
        with torch.no_grad():
            clip_FHWC = vae.decode(latent).sample[0].permute(1, 2, 3, 0)
        return np.abs(shown - ((clip_FHWC / 2 + 0.5).clamp(0, 1) * 255).numpy()).mean()

    assert distance(stored) < 0.5 * distance(stored / vae.config.scaling_factor)
    for name, path in zip(names, images, strict=True):
        frame = Image.open(embedding_file(run, name).with_suffix(".png"))
        assert frame.size == (48, 32) and frame.getpixel((5, 5)) == Image.open(path).getpixel((5, 5))
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
        kept = safetensors.torch.load_file(embedding_file(run, name))["image"]
        with torch.no_grad():
            assert torch.allclose(kept[0], vae.encode(pixels).latent_dist.mean[0, :, 0], atol=1e-5)
    assert (run / "report.html").read_text().count("first frame") >= 3


@pytest.mark.parametrize(
    ("form", "settings", "says", "fix"),
    [
        ("tiny", {"validate_prompt": ["  "]}, "there is no prompt", '--validate-prompt "'),
        ("tiny", {"validate_prompts": "none.txt"}, "cannot be read", "a prompt in each line"),
        (
            "tiny",
            {"validate_prompt": [RED], "validate_image": [PICTURE]},
            "takes no image",
            "leave --validate-image",
        ),
        ("tiny", {"validate_image": [PICTURE]}, "no prompt that it could", "--validate-prompt"),
        ("tiny-i2v", {"validate_prompt": [RED]}, "none was given", "--validate-image FILE"),
        (
            "tiny-i2v",
            {"validate_prompt": [RED], "validate_image": [PICTURE]},
            "cannot be used",
            "--validate-image",
        ),
        (
            "tiny-i2v",
            {"validate_prompt": list("abc"), "validate_image": [PICTURE] * 2},
            "2 images",
            "one for each",
        ),
    ],
)
def test_refused_before_a_weight_is_read(tmp_path, make_shards, train_here, monkeypatch, form, settings, says, fix):
    make_shards(tmp_path / "shards", form, samples=1)
    monkeypatch.setattr(Checkpoint, "load_transformer", lambda *_: pytest.fail("a weight was loaded"))
    if "validate_prompts" in settings:
        settings = {"validate_prompts": tmp_path / settings["validate_prompts"]}
    with pytest.raises(SettingError) as caught:
        train_here(LoraSettings(shards=[str(tmp_path / "shards")], steps=1, out=tmp_path / "run", **settings))
    assert says in caught.value.what and fix in (caught.value.fix or ""), str(caught.value)
    assert not (tmp_path / "run").exists()
