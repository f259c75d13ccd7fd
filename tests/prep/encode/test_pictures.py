"""Pictures among clips: each a clip of one frame, in buckets of one frame; encoded, looked at and checked as clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image
from typer.testing import CliRunner

from cogcommon.errors import SettingError
from cogcommon.media.image import scale_to_cover
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.shards.records import SampleRow, read_record, split_extent
from cogprep.cli import app
from cogprep.commands.validate import validate
from cogprep.dataset.probe import look_at
from cogprep.settings.encode import EncodeSettings, ValidateSettings
from cogprep.source.clip import ClipFault
from cogprep.video.decode import decode_clip

SIZES = ["9x64x96", "1x64x96", "1x96x64"]


def painted(height: int, width: int) -> np.ndarray:
    """Smooth, and no two corners alike."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([255 * x, 255 * y, 127 + 100 * np.sin(5 * (x + y))], -1).astype(np.uint8)


def cogprep(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, draw_clip, lay_lists) -> Path:
    """``ds`` and what `encode` made of it: two clips, and three pictures: turned by EXIF, with alpha, and upright."""
    folder = tmp_path_factory.mktemp("mixed")
    root = folder / "ds"
    for number in range(2):
        draw_clip(root / f"{number}.mp4", number)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(painted(300, 200)).save(root / "turned.JPG", exif=exif, quality=95)
    alpha = np.dstack([painted(128, 192), np.full((128, 192), 255, np.uint8)])
    alpha[:, :96, 3] = 0
    Image.fromarray(alpha).save(root / "half.webp", lossless=True, exact=True)
    Image.fromarray(painted(144, 96)).save(root / "upright.png")
    names = ["0.mp4", "turned.JPG", "1.mp4", "half.webp", "upright.png"]
    lay_lists(root, [f"shows {name}" for name in names], names)
    encode(folder)
    return folder


def encode(folder: Path) -> dict[str, object]:
    words = ["encode", "--data-root", folder / "ds", "--out", folder / "out", "--model", "tiny", "--workers", 1]
    report: dict[str, object] = json.loads(cogprep(*words, "--json", "--resolution", *SIZES))
    return report


def rows_of(out: Path) -> dict[str, tuple[SampleRow, dict[str, torch.Tensor]]]:
    """Each sample's row and tensors, by its source."""
    found = {}
    for path in sorted(out.glob("*.parquet")):
        tar = path.with_suffix(".tar").read_bytes()
        for row in read_record(path).rows:
            _, payload = split_extent(tar[row.offset :][: row.size], row)
            found[row.source] = row, safetensors.torch.load(payload)
    return found


def test_pictures_go_to_the_buckets_of_one_frame_and_clips_to_the_others(mixed):
    rows = rows_of(mixed / "out")
    assert {source: row.bucket for source, (row, _) in rows.items()} == {
        "0.mp4": SIZES[0], "1.mp4": SIZES[0], "turned.JPG": SIZES[1], "half.webp": SIZES[1], "upright.png": SIZES[2],
    }  # fmt: skip
    vae = open_checkpoint("tiny").load_vae(torch.float32)
    expected = {
        "turned.JPG": Image.open(mixed / "ds" / "turned.JPG").transpose(Image.Transpose.ROTATE_270),
        "upright.png": Image.open(mixed / "ds" / "upright.png"),
        "half.webp": Image.fromarray(np.where(np.arange(192)[:, None] < 96, 0, painted(128, 192)).astype(np.uint8)),
    }
    for source, picture in expected.items():
        row, tensors = rows[source]
        height, width = (int(size) for size in row.bucket.split("x")[1:])
        pixels = VideoProcessor(vae_scale_factor=8).preprocess_video([scale_to_cover(picture, width, height)])
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        assert torch.equal(tensors["latent_mean"], posterior.mean[0]), source
        assert torch.equal(tensors["latent_std"], posterior.std[0])
        assert tensors["latent_mean"].shape == (16, 1, height // 8, width // 8)
        assert (row.frames, row.effective_fps) == ([0], 8.0)
    report = json.loads((mixed / "out" / "report.json").read_bytes())
    assert (report["encoded"], report["pictures"], report["rejected"]) == (5, 3, 0)


def test_they_are_checked_encoded_again_shown_and_reused(mixed):
    verified = json.loads(cogprep("verify", mixed / "out", "--reencode", 5, "--json"))
    assert len(verified["differences"]) == 5 and all(one["largest"] == 0 for one in verified["differences"])
    preview = json.loads(cogprep("preview", mixed / "out", "--samples", 5, "--json"))
    scores = {sample["source"]: sample["psnr"] for sample in preview["samples"]}
    assert len(scores) == 5 and min(scores.values()) > 15
    assert ">a picture<" in Path(preview["page"]).read_text()
    assert "1x64x96: 2, 1x96x64: 1, 9x64x96: 2" in cogprep("inspect", mixed / "out")
    again = encode(mixed)
    assert (again["encoded"], again["reused"], again["pictures"]) == (0, 5, 0)


def test_the_plan_has_a_row_for_each_bucket(mixed):
    settings = ValidateSettings(data_root=mixed / "ds", resolution=SIZES, model="tiny", out=mixed / "other", workers=1)
    verdict = validate(settings)
    assert not verdict.faults and [row.clips for row in verdict.plan] == [2, 2, 1]
    assert not {advice.kind for advice in verdict.advice} & {"speed", "held pictures", "variable rate"}


def test_what_has_no_bucket_is_left_out_with_the_sizes_to_type(mixed, tmp_path):
    settings = ValidateSettings(data_root=mixed / "ds", resolution=SIZES[:1], model="tiny", out=tmp_path, workers=1)
    faults = {fault.entry: fault.what for fault in validate(settings).faults}
    assert sorted(faults) == ["half.webp", "turned.JPG", "upright.png"]
    assert all("--resolution 9x64x96 1x64x96" in what for what in faults.values())
    (fault,) = look_at(
        [mixed / "ds" / "0.mp4"], ValidateSettings(data_root=mixed, resolution=SIZES[1:]).buckets, CUT, 8
    )
    assert isinstance(fault, ClipFault) and "--resolution 49x64x96 1x64x96 1x96x64" in fault.reason
    with pytest.raises(SettingError, match="learns from clips"):
        EncodeSettings(data_root=mixed, resolution=["1x64x96"], model="tiny-1.5-i2v").open_model()


CUT = EncodeSettings(data_root=Path("ds"), resolution=SIZES, frames="even", start=3, stride=2).cut


def test_how_clips_are_cut_in_time_says_nothing_of_pictures(mixed):
    clip = decode_clip(
        mixed / "ds" / "upright.png", EncodeSettings(data_root=mixed, resolution=SIZES).buckets[2], CUT, 8, ""
    )
    assert not isinstance(clip, ClipFault) and clip.frames_FHWC.shape == (1, 96, 64, 3)


def test_pictures_that_cannot_be_used_say_why_and_an_animation_is_a_clip(tmp_path):
    """Each by its name; those that can be told only when they are read, too."""
    first, *others = [Image.fromarray(np.roll(painted(64, 96), 9 * time, 1)) for time in range(12)]
    first.save(tmp_path / "moves.png", save_all=True, append_images=others, duration=125)
    first.save(tmp_path / "moves.webp", save_all=True, append_images=others)
    first.save(tmp_path / "still.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "still.png").read_bytes()[:-200])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    names = ["moves.png", "moves.webp", "still.png#t=0,1", "cut.png", "text.jpg", "huge.png", "none.png"]
    settings = EncodeSettings(data_root=tmp_path, resolution=SIZES)
    moves, *faults = look_at([tmp_path / name for name in names], settings.buckets, settings.cut, 8)
    assert not isinstance(moves, ClipFault) and str(moves.bucket) == SIZES[0]
    said = ["an animated WebP", "a part of a picture", "damaged, or cut short", "not a picture", "178 mega", "missing"]
    for fault, what in zip(faults, said, strict=True):
        assert isinstance(fault, ClipFault) and what in fault.reason, fault
