"""generate: tuned and base video of one seed, for all five forms, from a run, a file or a folder."""

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from in_process import OneCommand
from PIL import Image
from safetensors.torch import save_file

from cogcommon.cli import progress
from cogcommon.errors import SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BUILTIN_NAMES, BY_NAME, Resolution
from cogcommon.model.tokens import cut_text
from cogtrain.commands import generate
from cogtrain.data.prompts import validation_prompts
from cogtrain.data.shard_set import usual_sizes
from cogtrain.distributed.snapshot import STATE_FILE
from cogtrain.model import lora
from cogtrain.report import page
from cogtrain.report.sheet import Column, contact_sheet, side_by_side
from cogtrain.runs.folder import FACTS_FILE
from cogtrain.settings.results import GenerateSettings
from cogtrain.validation import pipeline
from cogtrain.validation.pipeline import Request, generate_video, load_pipeline, move_pipeline, step_bytes, to_base
from cogtrain.validation.tuned import Tuned, find_tuned
from workshop.bench_train.subject import random_checkpoint

SMALL = ["--prompt", "a red ball rolls to the left", "--steps", "2", "--resolution", "17x64x96"]


command = OneCommand("generate", GenerateSettings, generate.run)
fault = command.fault


@pytest.fixture
def make_run(tmp_path, live_model):
    def make(name="tiny"):
        checkpoint, transformer = live_model(name)
        run = tmp_path / f"run-{name}"
        lora.save(lora.state_dict(transformer), run, {"family": checkpoint.family.name, "base_model": name})
        (run / "config.toml").write_text(f'model = "{name}"\n')
        return run

    return make


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)).save(path)
    return path


def frames_of(path: Path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_every_form_draws_tuned_and_base_from_a_run(tmp_path, make_run, picture, name):
    run = make_run(name)
    image = ["--image", picture] if "i2v" in name else []
    result = command("--run", run, *SMALL, *image, "--out", tmp_path / "videos")
    assert result.exception is None, result.exception
    tuned, fps = frames_of(tmp_path / "videos/tuned.mp4")
    base, _ = frames_of(tmp_path / "videos/base.mp4")
    assert tuned.shape == base.shape == (17, 64, 96, 3)
    assert fps == open_checkpoint(name).family.fps
    assert (tuned != base).any()
    assert frames_of(tmp_path / "videos/side-by-side.mp4")[0].shape[0] == 17
    assert Image.open(tmp_path / "videos/contact-sheet.png").width > 1000


def test_a_run_is_drawn_on_the_revision_that_it_was_trained_on(recorded_run, monkeypatch):
    (recorded_run / lora.FILE).write_bytes(b"a LoRA")
    facts = json.loads((recorded_run / FACTS_FILE).read_text())
    (recorded_run / FACTS_FILE).write_text(json.dumps(facts | {"revision": "0" * 40}))
    asked, here = [], open_checkpoint("tiny")
    monkeypatch.setattr(
        "cogtrain.runs.folder.open_checkpoint", lambda name, revision=None, **_: asked.append(revision) or here
    )
    find_tuned(recorded_run, [], None, None)
    find_tuned(recorded_run, [], None, "tiny")
    assert asked == ["0" * 40, None]


def test_a_prompt_without_the_word_that_its_run_was_trained_with_is_told(recorded_run):
    (recorded_run / lora.FILE).write_bytes(b"a LoRA")
    asked = [SimpleNamespace(prompt=prompt, negative_prompt="") for prompt in ("sks runs", "a dog", "a cat")]
    assert list(generate.notes_on(asked, find_tuned(recorded_run, [], None, "tiny"))) == []
    facts = json.loads((recorded_run / FACTS_FILE).read_text())
    (recorded_run / FACTS_FILE).write_text(json.dumps(facts | {"id_token": "sks"}))
    tuned = find_tuned(recorded_run, [], None, "tiny")
    (note,) = generate.notes_on(asked, tuned)
    assert "'sks' in front of its captions" in note and '"a dog" and 1 more' in note
    assert list(generate.notes_on(asked, dataclasses.replace(tuned, id_token=""))) == []


def test_the_base_video_is_the_base_models_and_the_seed_alone_decides(make_run, monkeypatch):
    """Against the plain diffusers pipeline, called as its documentation says."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

    tuned = find_tuned(make_run(), [], None, None)
    request = Request("a ball", None, Resolution(17, 64, 96), 3, 6.0, 7, 226, True)
    pipeline = load_pipeline(tuned, torch.float32)
    steps, decoding, decode = [], [], pipeline.vae.decode

    def watched(*words, **options):
        decoding.append([one.name for one in progress._display.stages])
        return decode(*words, **options)

    monkeypatch.setattr(pipeline.vae, "decode", watched)
    with_lora = generate_video(pipeline, request, lambda: steps.append(list(progress._display.stages)))
    assert steps == [[]] * 3 and decoding == [["decoding the video"]]
    to_base(pipeline, tuned, torch.float32)
    base = generate_video(pipeline, request, lambda: None)

    plain = CogVideoXPipeline.from_pretrained(tuned.checkpoint.root)
    plain.scheduler = CogVideoXDPMScheduler.from_config(plain.scheduler.config, timestep_spacing="trailing")

    def expected():
        video = plain(
            prompt="a ball", num_frames=17, height=64, width=96, num_inference_steps=3, guidance_scale=6.0,
            use_dynamic_cfg=True, generator=torch.Generator().manual_seed(7), output_type="np",
        ).frames[0]  # fmt: skip
        return (video * 255).round().astype(np.uint8)

    assert np.array_equal(base, expected())
    plain.load_lora_weights(tuned.loras[0].file.parent)
    assert np.array_equal(with_lora, expected())
    assert not np.array_equal(with_lora, base)


def test_several_loras_each_with_its_strength_as_diffusers_weighs_them(tmp_path, live_model):
    """Against diffusers' own `set_adapters`; one of the files is kohya's, and one's name holds a =."""
    _, first = live_model("tiny", seed=1)
    _, second = live_model("tiny", seed=2, rank=2)
    states = [lora.state_dict(transformer) for transformer in (first, second)]
    a = lora.save(states[0], tmp_path, {"family": "5b", "base_model": "tiny"}, "lr=0.1.safetensors")
    b = tmp_path / "theirs.safetensors"
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    kohya = {}
    for name, tensor in states[1].items():
        layer, side = name.removeprefix("transformer.").rsplit(".", 2)[:2]
        kohya[f"lora_unet_{layer.replace('.', '_')}.{sides[side]}.weight"] = tensor
    save_file(kohya, b)

    tuned = find_tuned(None, [f"{a}=0.8", f"{b}=0.5"], None, None)
    assert [one.strength for one in tuned.loras] == [0.8, 0.5]
    assert find_tuned(None, [str(a)], None, None).loras[0].strength == 1
    assert tuned.checkpoint.name == "tiny"
    told = []
    request = Request("a ball", None, Resolution(9, 64, 96), 2, 6.0, 7, 226, True, "blurred")
    drawn = generate_video(load_pipeline(tuned, torch.float32, told.append), request, lambda: None)
    assert [line for line in told if "kohya names, no alpha, so it acts with scale 1" in line] == told != []

    load_pipeline(find_tuned(None, [str(b)], None, "tiny"), torch.float32, told.append)
    assert "give --lora FILE=alpha/2; CogVideo's SAT has 1, so =0.5" in told[-1]

    plain = pipeline.pipeline_of(tuned.checkpoint, tuned.checkpoint.load_transformer(torch.float32), torch.float32)
    for name, state in zip("ab", states, strict=True):
        plain.load_lora_weights(state, adapter_name=name)
    plain.set_adapters(["a", "b"], [0.8, 0.5])
    assert np.array_equal(drawn, generate_video(plain, request, lambda: None))
    plain.set_adapters(["a", "b"], [0.8, 1.0])
    assert not np.array_equal(drawn, generate_video(plain, request, lambda: None))


def test_several_prompts_load_the_models_once(make_run, tmp_path, monkeypatch):
    run = make_run()
    loaded = []
    monkeypatch.setattr(generate, "load_pipeline", lambda *words: loaded.append(1) or load_pipeline(*words))
    (tmp_path / "prompts.txt").write_text("a green box\n\na red ball\n", encoding="utf-8-sig")
    long = "word " * 120 + "and the end"
    small = ["--steps", "1", "--resolution", "9x64x96", "--guidance", "3", "--negative-prompt", "blur"]
    words = ["--run", run, "--strength", "0.5", "--prompt", "a red ball", "--prompt", long]
    result = command(*words, "--prompts", tmp_path / "prompts.txt", *small, "--out", tmp_path / "out", "--json")
    assert result.exception is None, result.exception
    assert len(loaded) == 1
    videos = json.loads(result.stdout)["videos"]
    assert [video["prompt"] for video in videos] == ["a red ball", long, "a green box"]
    names = {"tuned.mp4", "base.mp4", "side-by-side.mp4", "contact-sheet.png"}
    for video in videos:
        assert {Path(file).name for file in video["files"].values()} == names
        assert all(Path(file).parents[1] == tmp_path / "out" for file in video["files"].values())
    cut = cut_text(long, open_checkpoint("tiny").load_tokenizer(), 226)
    assert f"has {cut.tokens} tokens, and 5b reads 226" in result.stderr
    assert (cut.kept + cut.lost).replace(" ", "") == long.replace(" ", "")
    assert f'this is lost: "{cut.lost}"' in result.stderr
    assert "0.5" in json.loads((Path(videos[0]["files"]["tuned"]).parent / ".cogtune.json").read_text())["request"]
    assert "in front of its captions" not in result.stderr  # it is not known
    assert 'note: "a red ball" is given twice; it is drawn once' in result.stderr
    # A sentence without its quotes is no list of prompts.
    stray = command("--run", run, "--prompt", "a", "red", "ball").exception
    assert isinstance(stray, SettingError) and "red ball" in stray.what


def test_prompts_may_come_through_a_pipe(make_run, tmp_path, monkeypatch):
    """`--prompts <(...)`: it can be read once."""

    def load(*_words):
        raise SettingError("all that was asked is known")

    monkeypatch.setattr(generate, "load_pipeline", load)
    run = make_run()
    os.mkfifo(tmp_path / "prompts")
    threading.Thread(target=(tmp_path / "prompts").write_text, args=("a ball\na ball\n",), daemon=True).start()
    result = command("--run", run, "--prompts", tmp_path / "prompts", "--steps", "1")
    assert "all that was asked is known" in str(result.exception)
    assert 'note: "a ball" is given twice; it is drawn once' in result.output


def test_a_first_frame_is_drawn_at_the_runs_size_that_keeps_most_of_it(tmp_path):
    """A portrait lay on its side, cut to a third, where most clips of a run were landscape."""
    wide, tall, longer = Resolution(17, 64, 96), Resolution(17, 96, 64), Resolution(33, 64, 96)
    facts_sizes = usual_sizes({tall: 2, Resolution(1, 64, 64): 9, wide: 3, longer: 1})
    assert facts_sizes == [wide, tall, longer]
    checkpoint = open_checkpoint("tiny-1.5-i2v")
    tuned = Tuned(checkpoint, (), None, facts_sizes)
    images = []
    for number, (shape, size) in enumerate({(200, 360): tall, (360, 200): wide, (90, 90): wide}.items()):
        images.append(tmp_path / f"{number}.png")
        Image.new("RGB", shape).save(images[-1])
        (request,) = generate.requests_of(GenerateSettings(prompt=["a"], image=images[-1]), tuned)
        assert request.resolution == size and request.image.size == (size.width, size.height)
    asked = GenerateSettings(prompt=["a"], image=images[0], resolution="17x64x96")
    assert generate.requests_of(asked, tuned)[0].resolution == wide
    drawn = validation_prompts(["a", "b"], None, images[:2], checkpoint, facts_sizes, "fp32")
    assert [prompt.size for prompt in drawn] == [tall, wide]


def test_stopped_it_says_what_is_there_and_the_same_command_makes_the_rest(make_run, monkeypatch):
    run, drawn = make_run(), []
    whole = generate.generate_video

    def stopped(pipeline, request, advance):
        drawn.append(request.prompt)
        if len(drawn) == 4:
            raise KeyboardInterrupt  # as Ctrl-C, in the second prompt's base video
        return whole(pipeline, request, advance)

    monkeypatch.setattr(generate, "generate_video", stopped)
    words = ["--run", run, "--prompt", "a ball", "--prompt", "a cube", "--steps", "1", "--resolution", "9x64x96"]
    ended = command(*words)
    (half,) = (run / "generated").glob("a-cube-*")
    assert ended.exit_code == 130
    (said,) = [line for line in ended.stderr.splitlines() if "stopped" in line]
    how = "run the same command again to have the rest"
    assert said == f"stopped; 1 of 2 prompts drawn; not finished: {half}; {how}"
    assert [path.name for path in half.glob("[!.]*")] == ["tuned.mp4"] and page._prompt(half) == "a cube (not finished)"
    again = command(*words)
    assert again.exception is None and drawn[4:] == ["a cube"] * 2
    assert len(list(half.glob("[!.]*"))) == 4 and page._prompt(half) == "a cube"
    assert again.stdout.count("contact-sheet.png") == again.stdout.count("side-by-side.mp4") == 2


@pytest.mark.parametrize(
    ("gib", "family", "guidance", "way"),
    [
        (40, "5b", 6, "to"),
        (28, "5b", 6, "to, tiles"),
        (22, "5b", 6, "model, tiles"),
        (9, "5b", 6, "layers, tiles"),
        (15, "5b", 6, "model, tiles"),
        (15, "1.5-5b", 6, "layers, tiles"),  # a step works on 7.7 GiB, not on 3
        (15, "1.5-5b", 1, "model, tiles"),
        (100, "1.5-5b", 6, "to"),
    ],
)
def test_each_video_is_placed_by_its_size_and_the_base_video_as_the_tuned_one_was(
    monkeypatch, gib, family, guidance, way
):
    """On a GPU that holds the pipeline and a decode, but not a second time."""
    told = []

    class Pipeline:
        def __init__(self):
            sizes = {"text_encoder": 9.5, "transformer": 10.4, "vae": 0.4}
            self.components = {
                name: torch.nn.Linear(1 << 14, int(size * 2**15), bias=False, device="meta", dtype=torch.bfloat16)
                for name, size in sizes.items()
            }
            self.vae = SimpleNamespace(enable_tiling=lambda height, width: told.append("tiles"))

        def to(self, device):
            told.append("to")

        def enable_model_cpu_offload(self, device):
            told.append("model")

        def enable_sequential_cpu_offload(self, device):
            told.append("layers")

    resolution = BY_NAME[family].native
    step = step_bytes(random_checkpoint(family), resolution, guidance, 2)
    # As if the parts were not on this device at first, and for the second video were, where there was room.
    for device, used in [("cuda", 0.0), ("meta", 20.3)][: 2 if way.startswith("to") else 1]:
        monkeypatch.setattr(pipeline, "free_gpu_memory", lambda device, used=used: int((gib - used) * 2**30))
        move_pipeline(Pipeline(), torch.device(device), resolution, step)
        assert ", ".join(told) == way
        told.clear()


def test_a_fully_tuned_transformer_is_used_and_the_base_is_read_from_the_checkpoint(tmp_path):
    checkpoint = open_checkpoint("tiny-2b")
    transformer = checkpoint.load_transformer(torch.float32)
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.5)
    transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "config.toml").write_text('model = "tiny-2b"\n')
    by_run = command("--run", tmp_path, *SMALL, "--out", tmp_path / "a", "--json")
    assert by_run.exception is None, by_run.exception
    files = json.loads(by_run.stdout)["files"]
    video = frames_of(files["tuned"])[0].astype(float)
    to_base = np.abs(video - frames_of(files["base"])[0]).mean()
    assert to_base > 5

    by_folder = command(
        "--transformer", tmp_path / "transformer", "--model", "tiny-2b", *SMALL, "--no-base", "--out", tmp_path / "b"
    )
    assert by_folder.exception is None, by_folder.exception
    assert np.abs(video - frames_of(tmp_path / "b/tuned.mp4")[0]).mean() < to_base / 3  # x264's own rounding
    assert not (tmp_path / "b/base.mp4").exists()
    assert "not one of tiny:" in fault("--transformer", tmp_path / "transformer", "--model", "tiny", *SMALL)


def test_what_does_not_go_together_is_said_in_words(tmp_path, make_run, picture, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pytest.fail("a weight was loaded"))
    run, i2v = make_run("tiny"), make_run("tiny-1.5-i2v")
    file = run / lora.FILE
    assert "no tuned weights were named" in fault(*SMALL)
    assert "how strongly" in fault("--lora", file, "--strength", "0.5", *SMALL)
    assert "is no strength" in fault("--lora", f"{file}=much", *SMALL)
    assert "no such file" in fault("--lora", f"{tmp_path}/none.safetensors=0.5", *SMALL)
    assert "acts through guidance" in fault("--run", run, *SMALL, "--negative-prompt", "blur", "--guidance", "1")
    assert "cannot be read" in fault("--run", run, "--prompts", tmp_path / "none.txt")
    assert "named twice" in fault("--run", run, "--lora", file, *SMALL)
    assert "none was given" in fault("--run", i2v, *SMALL)
    assert "takes no image" in fault("--run", run, *SMALL, "--image", picture)
    assert "not a picture" in fault("--run", i2v, *SMALL, "--image", file)
    assert "the file is missing" in fault("--run", i2v, *SMALL, "--image", tmp_path / "none.png")
    assert "a folder" in fault("--run", i2v, *SMALL, "--image", tmp_path)
    with monkeypatch.context() as read_only:
        read_only.setattr("os.access", lambda path, mode: mode == os.R_OK)
        assert "no permission" in fault("--run", run, *SMALL)
    assert "no prompt" in fault("--run", run)
    assert "8N+1" in fault("--run", run, "--prompt", "x", "--resolution", "16x64x96")
    assert "no such file" in fault("--lora", tmp_path / "none.safetensors", *SMALL)
    assert "not a run folder" in fault("--run", tmp_path, *SMALL)
    shutil.copy(file, copy := tmp_path / "lr=1e-4.safetensors")
    assert "given twice" in fault("--lora", file, f"{copy}=0.5", *SMALL)
    told = fault("--lora", f"{tmp_path}/lr=1e-4/none.safetensors", *SMALL)
    assert "no such file" in told and "lr=1e-4/none" in told
    assert "not from an address" in fault("--lora", "https://a.example/x.safetensors?download=true", *SMALL)
    assert f"--transformer {run}/transformer" in not_in_place(run)
    for option, value in (("--strength", "nan"), ("--guidance", "inf"), ("--fps", "nan"), ("--fps", "0"),
                          ("--seed", 2**64), ("--steps", 5000)):  # fmt: skip
        assert option in fault("--run", run, *SMALL, option, value)
    file.unlink()
    assert "it has no checkpoint either" in fault("--run", run, *SMALL)
    kept = run / "checkpoint-20"
    kept.mkdir()
    (kept / STATE_FILE).touch()
    told = fault("--run", run, *SMALL)
    assert "no exported weights yet" in told and f"take its newest checkpoint: --run {kept}" in told
    assert f"the facts of the run are missing or damaged: No such file or directory\nwhere: {run}" in fault(
        "--run", kept, *SMALL
    )


def test_a_lora_of_another_family_is_refused(make_run):
    assert "trained for 5b" in fault("--lora", make_run() / lora.FILE, "--model", "tiny-2b", *SMALL)


def not_in_place(run) -> str:
    """What is said of the folder around a transformer folder."""
    (run / "transformer").mkdir()
    (run / "transformer/config.json").touch()
    told = fault("--transformer", run, *SMALL)
    shutil.rmtree(run / "transformer")
    return told


def test_a_video_of_no_numbers_is_refused_and_not_shown_as_black(make_run):
    words = ["--prompt", "x", "--steps", "1", "--resolution", "1x64x96", "--no-base"]
    run = make_run()
    assert "what is no number" in fault("--run", run, *words, "--strength", "1e38")
    assert not list(run.rglob("*.mp4"))


def test_the_image_is_cut_and_not_stretched(make_run, picture):
    """A circle in a wide picture stays a circle."""
    from PIL import ImageDraw

    wide = Image.new("RGB", (400, 100), "black")
    ImageDraw.Draw(wide).ellipse((160, 10, 240, 90), fill="white")
    wide.save(picture)
    settings = GenerateSettings(run=make_run("tiny-i2v"), prompt=["x"], image=picture)
    (request,) = generate.requests_of(settings, find_tuned(settings.run, [], None, None))
    white = np.asarray(request.image)[..., 0] > 127
    assert request.image.size == (96, 64)
    assert abs(np.ptp(white.any(0).nonzero()[0]) - np.ptp(white.any(1).nonzero()[0])) <= 1


@pytest.mark.parametrize("size", [(400, 100), (97, 211), (96, 64), (640, 480)])
def test_the_image_is_the_one_that_encode_trains_on(make_run, tmp_path, size):
    """Turned by its EXIF, its alpha over black, scaled and cut alike: not one pixel differs."""
    from cogprep.video.cut import Cut
    from cogprep.video.decode import read_image

    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "cutout.png", exif=exif)
    settings = GenerateSettings(run=make_run("tiny-i2v"), prompt=["x"], image=tmp_path / "cutout.png")
    (request,) = generate.requests_of(settings, find_tuned(settings.run, [], None, None))
    encoded = read_image(settings.image, request.resolution, Cut(), "key")
    assert np.array_equal(np.asarray(request.image), encoded)


def test_sheets_hold_the_frames_where_they_say():
    red = np.zeros((17, 64, 96, 3), np.uint8)
    red[..., 0] = 200
    blue = red[..., ::-1]
    beside = side_by_side([Column("tuned", red), Column("base", blue)])
    assert beside.shape[0] == 17
    assert beside.shape[1] % 2 == beside.shape[2] % 2 == 0
    assert np.array_equal(beside[:, -64:, :96], red)
    assert np.array_equal(beside[:, -64:, -96:], blue)
    sheet = np.asarray(contact_sheet("word " * 200, "facts", [Column("tuned", red), Column("base", blue)], 8))
    assert (sheet == (200, 0, 0)).all(-1).sum() == (sheet == (0, 0, 200)).all(-1).sum() > 6 * 200 * 100
