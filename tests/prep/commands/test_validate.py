"""`cogprep validate`: every fault with its line, advice that is true, a plan that encode keeps."""

from __future__ import annotations

import io
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus import card, cards, cut_short, write, write_sound
from rich.console import Console
from typer.testing import CliRunner

from cogcommon.errors import DataRootError, SettingError
from cogcommon.model.families import BY_NAME, FAMILIES, Resolution
from cogcommon.shards.records import read_record
from cogprep.cli import app
from cogprep.commands.validate import look_at_all, run, validate
from cogprep.commands.verdict import show
from cogprep.dataset.guesses import guess_folders, guess_turned, guess_uncaptioned
from cogprep.dataset.probe import Look, inside_bars
from cogprep.dataset.remedies import Remedies, recorded
from cogprep.plan.plan import tensor_bytes
from cogprep.settings.encode import EncodeSettings, ValidateSettings
from cogprep.source.clip import ClipFault
from cogprep.source.remote import Unreached
from cogprep.video.cut import Cut, pick_frames


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve good, odd and bad clips with their lists."""
    root = tmp_path_factory.mktemp("ds")
    (root / "videos").mkdir()
    make = {
        "good.mp4": lambda p: write(p, cards(frames=60)),
        "again.mp4": lambda p: write(p, cards(frames=60)),
        "fast.mp4": lambda p: write(p, cards(frames=30), fps=60),
        "long.mp4": lambda p: write(p, cards(frames=60), options={"crf": "20"}),
        "turned.mp4": lambda p: write(p, [np.rot90(c, -1) for c in cards(frames=60)], rotate=90),
        "tall.mp4": lambda p: write(p, cards(96, 144, 60)),
        "barred.mp4": lambda p: write(p, [letterboxed(c, 12) for c in cards(frames=60)]),
        "small.mp4": lambda p: write(p, cards(48, 32, 60)),
        "cut.mp4": lambda p: cut_short(root / "videos/good.mp4", p),
        "sound.m4a": write_sound,
        "one.mp4": lambda p: write(p, cards()[:1]),
        "missing.mp4": lambda p: None,
    }
    for name, write_clip in make.items():
        write_clip(root / "videos" / name)
    captions = [f"a card with a bar, number {number}" for number in range(len(make))]
    captions[3] = "the quick brown fox jumps over the lazy dog " * 40
    captions[1] = captions[0]
    (root / "videos.txt").write_text("".join(f"videos/{name}\n" for name in make))
    (root / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
    return root


def letterboxed(picture, bar):
    picture = picture.copy()
    picture[:bar] = picture[-bar:] = 0
    return picture


@pytest.fixture
def settings(root, tmp_path):
    return ValidateSettings(
        data_root=root, resolution=["17x64x96"], model="tiny", out=tmp_path / "out", workers=2, precision="fp32"
    )


@pytest.fixture(scope="module")
def verdict(root, tmp_path_factory):
    return validate(
        ValidateSettings(
            data_root=root, resolution=["17x64x96", "17x96x64"], model="tiny",
            out=tmp_path_factory.mktemp("out"), workers=2, precision="fp32", shard_samples=2, holdout=1,
        )
    )  # fmt: skip


def test_every_fault_is_named_with_file_line_and_reason(verdict):
    assert [(fault.file, fault.line, fault.entry) for fault in verdict.faults] == [
        ("videos.txt", 9, "videos/cut.mp4"),
        ("videos.txt", 10, "videos/sound.m4a"),
        ("videos.txt", 11, "videos/one.mp4"),
        ("videos.txt", 12, "videos/missing.mp4"),
    ]
    for fault, reason in zip(verdict.faults, ["cut short", "only sound", "too short: 1 frame", "missing"], strict=True):
        assert reason in fault.what
    assert (verdict.lines, verdict.usable) == (12, 8)


def test_each_kind_of_fault_has_its_remedy_once(verdict):
    fixes = [fault.fix for fault in verdict.faults]
    for fix, words in zip(fixes, ["a whole copy", "a whole video", "--short repeat", "mend the path"], strict=True):
        assert words in fix and "out of every list" in fix
    console = Console(width=1000, file=io.StringIO(), highlight=False)
    twice = [*verdict.faults, replace(verdict.faults[0], line=13)]
    show(replace(verdict, faults=twice), console)
    page = console.file.getvalue()
    assert all(page.count(fix) == 1 for fix in fixes)
    assert page.count(verdict.faults[0].what) == 1 and re.search(r"videos.txt:13 +videos/cut.mp4 +the same\b", page)
    assert f"-> videos.txt:9, videos.txt:13: {fixes[0]}" in page


def test_a_shorter_size_is_named_where_there_is_one():
    def remedy(*faults):
        return Remedies(faults, [Resolution(17, 64, 96)], BY_NAME["2b"]).of(faults[0])

    fault = pick_frames([index / 8 for index in range(15)], 17, Cut(), 8.0)
    assert "--resolution 17x64x96 9x64x96" in remedy(fault) == remedy(recorded(fault.reason))
    assert "--resolution" not in remedy(fault, pick_frames([index / 8 for index in range(8)], 17, Cut(), 8.0))
    thinned = pick_frames([index / 8 for index in range(30)], 17, Cut(stride=5), 8.0)
    assert remedy(thinned).startswith("a smaller --start or --stride; or --short repeat")
    assert remedy(thinned) == remedy(recorded(thinned.reason))


def test_a_remedy_is_for_the_kind_of_a_fault_whatever_its_words():
    def remedy(fault):
        return Remedies([], [Resolution(17, 64, 96)], BY_NAME["2b"]).of(fault)

    again = "the same command again, once it can be read"
    assert remedy(Unreached("the server answers 503 (s3://empty/damaged/no video in it.mp4)").fault()) == again
    assert remedy(ClipFault("the decoder was killed", passing=True)) == again
    says_its_own = "its colours are coded as RGB; to convert it: ffmpeg -i CLIP OUT"
    assert remedy(recorded(says_its_own)) == "" and "saves them" in remedy(recorded("frame 3 of 9 cannot be decoded"))


def test_advice_on_speed_says_only_what_helps(settings, root):
    (root / "timed.txt").write_text("videos/fast.mp4\n")  # half a second

    def fix(**changes):
        chosen = replace(settings, videos="timed.txt", prompts="timed.txt", **changes)
        return next(one.fix for one in validate(chosen).advice if one.kind == "speed")

    assert fix() == "longer clips"
    assert fix(resolution=["25x64x96"]) == "longer clips"
    (root / "timed.txt").write_text("videos/good.mp4\n")  # 2.5 s at 24 fps
    assert fix(frames="head") == "--frames auto"
    assert fix(resolution=["33x64x96"]).startswith(
        "longer clips, or fewer frames: --resolution 17x64x96, which the longest"
    )


def test_advice_names_the_lines_it_is_about(verdict):
    lines = {advice.kind: [line for line, _ in advice.lines] for advice in verdict.advice}
    assert lines == {
        "few clips": [],
        "speed": [3],
        "black bars": [7],
        "long captions": [4],
        "duplicates": [2],
        "enlarged": [8],
        "turned, stretched or cropped": [5],
    }
    details = {advice.kind: [detail for _, detail in advice.lines] for advice in verdict.advice}
    assert details["speed"] == ["33.1 fps, 4.1x slow motion"]  # 16 intervals over 29 of a 60th
    assert details["black bars"] == ["crop=144:68:0:14"]
    assert details["duplicates"] == ["as line 1, videos/good.mp4"]
    assert details["turned, stretched or cropped"] == ["turned by 270 degrees: used as 144x96"]
    tokens, cut = details["long captions"][0].split(": ")
    assert int(tokens.split()[0]) > 226
    kept, lost = cut.strip(".").split(" | ")
    assert f"{kept} {lost}".replace("...", "") in "the quick brown fox jumps over the lazy dog " * 40


def test_the_plan_says_bucket_frames_rate_and_loss(verdict):
    wide, tall = verdict.plan
    assert (wide.resolution, wide.clips, tall.resolution, tall.clips) == (
        Resolution(17, 64, 96), 7, Resolution(17, 96, 64), 1,
    )  # fmt: skip
    assert wide.source_frames == (30, 60)
    assert wide.fps[0] == pytest.approx(8, abs=0.1)
    assert wide.fps[1] == pytest.approx(16 / (29 / 60), abs=0.1)
    assert wide.loss == (0, 0)


def test_encode_keeps_the_plan_and_refuses_what_validate_says(settings, root, capsys):
    """Shards, samples, held out samples and the size of the tensors are what encode then writes."""
    from cogprep.commands.encode import encode

    # without the clip of one frame: encode finds that out when it decodes, and has planned a place for it
    for name in ("videos.txt", "prompts.txt"):
        kept = [line for number, line in enumerate((root / name).read_text().splitlines(), 1) if number != 11]
        (root / f"some-{name}").write_text("\n".join(kept))
    chosen = {
        "prompts": "some-prompts.txt", "videos": "some-videos.txt", "shard_samples": 3, "holdout": 1,
        "resolution": ["17x64x96", "17x96x64"],
    }  # fmt: skip
    verdict = validate(replace(settings, **chosen))
    fields = {name: getattr(settings, name) for name in ("data_root", "model", "out", "workers", "precision")}
    report = encode(EncodeSettings(**fields, **chosen))
    records = [read_record(path) for path in settings.out.rglob("[0-9]*.parquet")]
    rows = [row for record in records for row in record.rows if row.status == "ok"]
    assert report.rejected == len(verdict.faults)
    assert len(rows) == verdict.usable
    assert len(records) == sum(row.shards for row in verdict.plan)
    assert sum(len(read_record(path).rows) for path in (settings.out / "val").glob("*.parquet")) == verdict.validation
    for bucket in verdict.plan:
        inside = [row for row in rows if row.bucket == str(bucket.resolution)]
        assert len(inside) == bucket.clips
        written = sum(row.tensors_size for row in inside)
        assert bucket.bytes == pytest.approx(written, rel=0.01)  # a safetensors header a sample
        rates = [row.effective_fps for row in inside]
        assert (min(rates), max(rates)) == pytest.approx(bucket.fps)
    (root / "one-good.txt").write_text("videos/good.mp4\n")
    with pytest.raises(DataRootError) as caught:
        run(replace(settings, videos="one-good.txt", prompts="one-good.txt", frames="even"))
    page = capsys.readouterr().out
    for line in (
        "encode would refuse: ",
        "where: --resolution: ",
        "       --frames: 'even' here",
        "do:    use the old settings",
    ):
        assert page.count(f"\n  {line}") == 1
    assert caught.value.what == "1 fault: encode would refuse" and caught.value.where == str(settings.out)


def test_unpaired_lists_are_named_beside_the_faults_of_clips(settings, root):
    (root / "short.txt").write_text("one\n\ntwo\n")
    verdict = validate(replace(settings, prompts="short.txt"))
    places = [(fault.file, fault.line) for fault in verdict.faults]
    assert places[:2] == [("short.txt", 2), ("videos.txt", 4)]
    assert ("videos.txt", 9) in places
    assert verdict.plan == ()
    assert "no plan" in verdict.notes[0]


def test_captions_to_come_hide_neither_bad_clips_nor_advice_nor_the_plan(settings, root, capsys):
    names = ["good", "again", "tall", "long", "cut"]
    (root / "five.txt").write_text("".join(f"videos/{name}.mp4\n" for name in names))
    (root / "blank.txt").write_text("\n" * 5)
    chosen = replace(settings, videos="five.txt", prompts="blank.txt", id_token="sks")
    verdict = validate(chosen)
    assert [fault.place for fault in verdict.faults] == [*(f"blank.txt:{line}" for line in range(1, 6)), "five.txt:5"]
    assert (verdict.usable, verdict.plan[0].clips, verdict.encode["new"]) == (4, 4, 0)
    told = {one.kind: one.fix for one in verdict.advice}
    assert told["much cut away"].startswith("--resolution 17x64x96 17x96x64: each clip goes to the shape that fits")
    assert not {"duplicates", "same captions", "captions all alike"} & set(told), "there are no captions to speak of"
    show(verdict, Console(width=100))
    assert "blank.txt:5 " in capsys.readouterr().out, "a file or a pipe gets every fault"
    show(verdict, Console(width=100, force_terminal=True, no_color=True))
    page = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert page.index("five.txt:5") < page.index("blank.txt:1 ") < page.index("blank.txt:3 ") < page.index("and 2 more")
    assert "blank.txt:4" not in page and "encode refuses" in page
    with pytest.raises(DataRootError, match="5 clips without a caption yet") as caught:
        chosen.read_lists("t2v").trusted()
    assert "each blank line of blank.txt" in caught.value.fix


def test_images_are_looked_at_for_i2v(settings, root):
    from PIL import Image

    for name, size in {"right.png": (288, 192), "square.png": (96, 96)}.items():
        Image.new("RGB", size, "red").save(root / name, icc_profile=b"junk" if name == "square.png" else None)
    (root / "three.txt").write_text("videos/good.mp4\nvideos/fast.mp4\nvideos/long.mp4\n")
    (root / "captions.txt").write_text("one\ntwo\nthree\n")
    (root / "stills.txt").write_text("right.png\nsquare.png\nnone.png\n")
    verdict = validate(
        replace(settings, model="tiny-i2v", videos="three.txt", prompts="captions.txt", images="stills.txt")
    )
    assert [(f.file, f.line, f.what) for f in verdict.faults] == [("stills.txt", 3, "image: the file is missing")]
    assert "images.txt" not in verdict.faults[0].fix
    shapes = next(advice for advice in verdict.advice if advice.kind == "image of another shape")
    assert shapes.lines == [(2, "image 96x96, clip 144x96")]
    ((line, why),) = next(advice for advice in verdict.advice if advice.kind == "colour profile of an image").lines
    assert line == 2 and why.startswith("square.png: ")
    assert verdict.usable == 2


def test_without_the_first_frames_that_are_listed_those_of_the_clips_are_a_way_out(settings, root):
    (root / "one.txt").write_text("videos/good.mp4\n")
    (root / "images.txt").write_text("images/good.png\n")  # no picture; a clip has its name
    chosen = replace(settings, model="tiny-i2v", videos="one.txt", prompts="one.txt")
    try:
        (fault,) = validate(chosen).faults
    finally:
        (root / "images.txt").unlink()
    assert (fault.file, fault.what) == ("images.txt", "image: the file is missing")
    assert fault.fix.endswith("; or remove images.txt: the first used frame of each clip is taken then")
    assert not validate(chosen).faults


@pytest.fixture(scope="module")
def held_root(tmp_path_factory):
    """One clip whose picture 9 stays for half a second."""
    root = tmp_path_factory.mktemp("held")
    frames = [*range(10), *range(22, 60)]
    write(root / "a.mp4", [card(index, frames=60) for index in frames], times=[index / 24 for index in frames])
    (root / "videos.txt").write_text("a.mp4\n")
    (root / "prompts.txt").write_text("a bar that waits\n")
    return root


def test_advice_on_held_pictures_is_true_of_what_is_picked(settings, held_root):
    told = {one.kind: one for one in validate(replace(settings, data_root=held_root)).advice}
    assert told["held pictures"].lines == [(1, "4 of 17 frames repeat the one before")]
    assert "keeps its speed" in told["variable rate"].what
    assert "speed" not in told
    told = {one.kind: one for one in validate(replace(settings, data_root=held_root, frames="head")).advice}
    assert "held pictures" not in told
    assert told["variable rate"].what == "--frames head takes frames by their number, so motion changes its speed"


def test_a_first_frame_that_encode_cannot_read_is_a_fault_already(settings, root, tmp_path):
    from PIL import Image

    Image.new("RGB", (288, 192), "red").save(tmp_path / "whole.png")
    (root / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    (root / "one.txt").write_text("videos/good.mp4\n")
    (root / "half.txt").write_text("half.png\n")
    chosen = {"videos": "one.txt", "prompts": "one.txt", "images": "half.txt"}
    (fault,) = validate(replace(settings, model="tiny-i2v", **chosen)).faults
    assert (fault.file, fault.line) == ("half.txt", 1)
    assert "image: damaged, or cut short" in fault.what


def invoke(*words):
    return CliRunner().invoke(app, ["validate", *map(str, words)])


def test_faults_exit_with_2_and_advice_does_not(root, tmp_path):
    base = ["--model", "tiny", "--resolution", "17x64x96", "--data-root"]
    failed = invoke(*base, root)
    assert isinstance(failed.exception, DataRootError)  # run_app prints it and exits with 2
    assert "4 faults" in str(failed.exception)
    (tmp_path / "videos").symlink_to(root / "videos")
    (tmp_path / "videos.txt").write_text("videos/good.mp4\nvideos/barred.mp4\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    passed = invoke(*base, tmp_path)
    assert passed.exit_code == 0
    assert "black bars" in passed.output
    assert "no faults" in passed.output


def test_the_page_is_readable_in_80_columns_and_json_has_everything(root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    base = ["--model", "tiny", "--resolution", "17x64x96", "--data-root", root]
    page = invoke(*base)
    lines = page.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if "bucket" in line)
    assert header.split() == ["bucket", "clips", "frames", "fps", "cut", "shards", "size"]
    told = json.loads(invoke(*base, "--json").stdout)
    assert len(told["faults"]) == 4
    assert told["plan"][0]["resolution"] == "17x64x96"


def test_large_numbers_still_fit_into_80_columns(verdict):
    large = replace(
        verdict.plan[0], resolution=Resolution(81, 768, 1360), clips=987_654, source_frames=(121, 12_400),
        fps=(5.123, 29.97), loss=(0.16, 0.44), shards=12_345, bytes=23_456_000_000_000, gpu_s=3e6,
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO(), highlight=False)
    show(replace(verdict, plan=[large, large]), console)
    page = console.file.getvalue()
    for word in ("81x768x1360", "987654", "121-12400", "5.12-30", "16%", "12345", "23.5 TB", "833 h 20 min"):
        assert word in page
    assert "…" not in page
    assert max(map(len, page.splitlines())) <= 80


def test_gpu_time_is_that_of_the_card_and_the_encoder_that_will_run():
    from cogprep.commands.validate import clip_seconds
    from cogprep.vae.seconds import vae_speed

    def seconds(model, size, card):
        settings = ValidateSettings(data_root=Path(), resolution=[size], model=model, out=Path("out"), gpu=card)
        return clip_seconds(settings, settings.open_model(geometry=True), settings.buckets[0], vae_speed(card))

    assert seconds("THUDM/CogVideoX-5b", "49x480x720", None) == pytest.approx(0.26)  # as measured
    assert seconds("THUDM/CogVideoX1.5-5B", "81x768x1360", "h200") == pytest.approx(0.26 * 741 / 149, rel=0.01)
    assert seconds("THUDM/CogVideoX-5b-I2V", "49x480x720", "H200") == pytest.approx(0.26 * 54 / 49)
    assert seconds("THUDM/CogVideoX-5b", "49x480x720", "4090") == pytest.approx(0.26 * 989.4 / 165.2)
    assert "one RTX 4090: 1.6 s a clip" in str(vae_speed("4090")) and "measured on an H200" in str(vae_speed("4090"))
    for unknown in ("24GB", "RTX 9999"):
        with pytest.raises(SettingError):
            vae_speed(unknown)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nothing can be connected to, and the hub's cache is empty."""
    import socket

    from huggingface_hub import constants

    def refuse(*_args, **_options):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_published_models_need_no_network(settings, root, no_network):
    (root / "two.txt").write_text("videos/good.mp4\nvideos/long.mp4\n")
    (root / "long.txt").write_text(f"{'the quick brown fox jumps over the lazy dog, ' * 40}\na card\n")
    for family in FAMILIES:
        opened = replace(settings, resolution=[str(family.native)], model=family.hub_id).open_model(geometry=True)
        assert (opened.family, opened.native) == (family, family.native)
    for family in FAMILIES[1], FAMILIES[-1]:
        chosen = {"videos": "two.txt", "prompts": "long.txt", "model": family.hub_id, "precision": None}
        verdict = validate(replace(settings, resolution=[str(family.native)], short="repeat", **chosen))
        assert (verdict.family, verdict.faults, verdict.usable) == (family.name, [], 2)
        assert (verdict.gpu, verdict.precision) == ("H200", family.precision)
        tensors = tensor_bytes(
            family, family.native, item_bytes=2, posterior="moments", image_variants=4, text_dim=4096
        )
        assert verdict.plan[0].bytes == 2 * tensors and verdict.plan[0].gpu_s > 0.5
        (cut,) = (one for one in verdict.advice if one.kind == "long captions")
        assert [line for line, _ in cut.lines] == [1] and cut.lines[0][1].startswith("about 4")
        assert any("lengths of captions are guessed" in note for note in verdict.notes)


def test_what_was_probably_meant_is_said(settings, root, capsys):
    (root / "bare.txt").write_text("good.mp4\nfast.mp4\nlong.mp4#t=0.5,2\n")
    (root / "alike.txt").write_text("A card, number 1.\na card - number 2\nA card number 3\n")
    chosen = replace(settings, videos="bare.txt", prompts="alike.txt")
    with pytest.raises(DataRootError, match="3 faults") as caught:
        run(chosen)
    assert "all 3 paths of bare.txt lack videos/" in capsys.readouterr().out
    command = caught.value.fix
    assert command.startswith("sed ")
    subprocess.run(command, shell=True, check=True)
    (root / "moved.txt").write_text((root / "bare.txt").read_text().replace("videos/", "/home/bob/d.s [1]/videos/"))
    verdict = validate(replace(chosen, videos="moved.txt"))
    assert [guess.what.split(";")[0] for guess in verdict.guesses] == [
        "all 3 paths of moved.txt begin with /home/bob/d.s [1]/"
    ]
    subprocess.run(verdict.guesses[0].fix, shell=True, check=True)
    assert (root / "moved.txt").read_text() == (root / "bare.txt").read_text()
    verdict = validate(replace(chosen, resolution=["17x96x64"]))
    assert verdict.faults == []
    (guess,) = verdict.guesses
    assert guess.fix == "--resolution 17x64x96" and guess.what.startswith("3 clips of 3 are wider than high")
    told = {one.kind: one.what for one in verdict.advice}
    assert "same captions" not in told and "A card, number 1." in told["captions all alike"]
    lying = [found for found in look_at_all(chosen, chosen.read_lists("t2v"), 8)[0].values() if isinstance(found, Look)]
    sizes = [Resolution(17, 64, 96), Resolution(17, 96, 64)]
    checkpoint = chosen.open_model()
    assert len(lying) == 3 and [*guess_turned(checkpoint, sizes[1:], lying)] == verdict.guesses
    assert not [*guess_turned(checkpoint, sizes[:1], lying), *guess_turned(checkpoint, sizes, lying)]
    entries = ["videos/good.mp4", "fast.mp4", "none.mp4"]
    assert not [*guess_folders(root, "some.txt", entries, entries[1:])]  # one of them is nowhere
    (guess,) = guess_uncaptioned(root, ("prompts.txt", "some.txt"), ["", "written", ""], 3)
    assert guess.what == "2 captions are still to be written" and guess.fix.endswith(
        f"caption {root} --videos some.txt"
    )
    (guess,) = guess_folders(root, "some.txt", entries[:2], entries[1:2])
    assert guess.what.startswith("1 path of some.txt lacks videos/") and "in front of these lines" in guess.fix


def dark_with_bright(height=90, width=160, left=0, top=0):
    picture = np.full((height, width, 3), 6, np.uint8)
    picture[top : height - top, left : width - left] = 120
    return picture


def test_bars_are_told_from_dark_pictures():
    assert inside_bars([dark_with_bright(left=20)], 160, 90) == (22, 0, 138, 90)
    assert inside_bars([dark_with_bright(top=10)] * 3, 320, 180) == (0, 22, 320, 158)
    assert inside_bars([dark_with_bright()], 160, 90) is None
    assert inside_bars([np.zeros((90, 160, 3), np.uint8)], 160, 90) is None
    night = dark_with_bright()
    night[:40] = 8  # a dark sky over a lit street: one side only
    assert inside_bars([night], 160, 90) is None
    # bars are black in every picture: one bright one clears them
    assert inside_bars([dark_with_bright(left=20), dark_with_bright()], 160, 90) is None
