"""`cogprep preview`: what is drawn is what was encoded."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from browsing import faults, fits, js
from corpus import FRAMES, assert_shows, cards, write
from PIL import Image
from typer.testing import CliRunner
from waiting import wait_until

from cogcommon.errors import DiskError, ModelError, SettingError, ShardError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.shards.records import LATENT_MEAN, tar_name
from cogprep.cli import app
from cogprep.commands.encode import encode
from cogprep.commands.preview import Decoder, choose_samples, make_preview, psnr, run
from cogprep.commands.verify import verify
from cogprep.plan.folder import read_contract, records_in
from cogprep.plan.removals import find_removals
from cogprep.settings.encode import EncodeSettings
from cogprep.settings.shards import PreviewSettings
from cogprep.show.preview_loop import GAP
from cogprep.show.preview_page import BOX, sample_facts, with_box
from cogprep.show.source_view import SourceView
from cogprep.source.clip import ClipFault
from cogprep.store.committed import read_tensors


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Three clips, wider than the bucket, in two shards."""
    root = tmp_path_factory.mktemp("ds")
    (root / "videos").mkdir()
    for name in ("a", "b", "c"):
        write(root / f"videos/{name}.mp4", cards(192, 96), options={"crf": "6" if name == "a" else "12"})
    shutil.copy(root / "videos/b.mp4", root / "videos/c.mp4")
    (root / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\nvideos/c.mp4\n")
    (root / "prompts.txt").write_text("a <b>bar</b> & a card\na second caption\na third caption\n")
    settings = EncodeSettings(
        data_root=root, out=root / "out", resolution=["17x64x96"], model="tiny", shard_samples=2, workers=1
    )
    assert encode(settings).encoded == 3
    return root


@pytest.fixture
def out(encoded, tmp_path):
    """A copy to do things to; it remembers its data root."""
    return Path(shutil.copytree(encoded / "out", tmp_path / "out"))


def test_both_sides_are_what_was_encoded(out):
    preview = make_preview(PreviewSettings(out=out))
    assert [shown.row.source for shown in preview.shown] == ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4"]
    for shown in preview.shown:
        source = shown.source
        assert isinstance(source, SourceView)
        assert (source.width, source.height) == (192, 96)
        assert list(source.box) == shown.row.crop_box == [24, 0, 168, 96]
        assert source.frames_FHWC.shape == shown.decoded_FHWC.shape == (9, 64, 96, 3)
        assert_shows(source.whole_HWC, shown.row.frames[0], FRAMES)
        assert shown.psnr == pytest.approx(psnr(source.frames_FHWC, shown.decoded_FHWC))


def test_the_decoded_beginning_equals_the_beginning_of_the_whole(out):
    decoder = Decoder(out, None, read_contract(out))
    _, number, row = choose_samples(list(records_in(out)), 1)[0]
    latent = read_tensors(out / tar_name(number), row)[LATENT_MEAN]
    vae = open_checkpoint("tiny").load_vae(torch.float32)
    with torch.inference_mode():
        whole = (vae.decode(latent[None].float()).sample[0] / 2 + 0.5).clamp(0, 1) * 255
    for frames in (9, 17):
        ours = decoder.frames(latent, frames)
        assert ours.shape == (frames, 64, 96, 3)
        assert np.abs(ours - whole.permute(1, 2, 3, 0).numpy()[:frames]).max() <= 0.51  # rounding to uint8


def test_pages_hold_everything_and_link_to_nothing(out):
    run(PreviewSettings(out=out))
    page = (out / "preview/index.html").read_text()
    assert "a &lt;b&gt;bar&lt;/b&gt; &amp; a card" in page
    assert "cut away" in page
    assert "25%" in page
    assert page.count("the first 9 of 17 frames at ") == page.count("<dd>17, from 0 to ") == 3
    row = make_preview(PreviewSettings(out=out, samples=1)).shown[0]
    read = replace(row, row=replace(row.row, colour="bt709 limited (untagged HD)"))
    assert ("colour", "bt709 limited (untagged, read as HD)") in sample_facts(read)
    loops = re.findall('<video src="data:video/mp4;base64,([^"]+)"', page)
    assert len(loops) == 3
    with av.open(io.BytesIO(base64.b64decode(loops[0]))) as loop:
        film = [frame.to_ndarray(format="rgb24") for frame in loop.decode(video=0)]
    assert len(film) == 9 and film[0].shape == (256, 2 * 384 + GAP, 3)
    first = make_preview(PreviewSettings(out=out, samples=1)).shown[0]
    both = first.source.frames_FHWC, first.decoded_FHWC
    for left, (mine, other) in ((0, both), (384 + GAP, both[::-1])):
        shown = [Image.fromarray(frame[:, left : left + 384]).resize((96, 64), Image.Resampling.BOX) for frame in film]
        assert psnr(np.stack(shown), mine) > max(25, psnr(np.stack(shown), other))
    sources = re.findall(r'<img [^>]*src="([^"]{0,30})', page)
    assert len(sources) == 3 * (1 + 2 * 4)  # the source, and four frames before and after the VAE
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "url(" not in page and not re.search(r'(?:src|href)="(?!data:)', page)
    sheet = Image.open(out / "preview/sheet-0.png").convert("RGB")
    assert sheet.width == 1600
    # the crop box is drawn, and what lies outside of it is dark
    colours = np.asarray(sheet).reshape(-1, 3)
    assert (colours == BOX).all(axis=1).sum() > 1000


def test_the_page_fits_a_phone_and_its_loops_play_when_asked(out, browser):
    run(PreviewSettings(out=out))
    page = f"file://{out.absolute() / 'preview/index.html'}"
    assert all(fits(browser, page, width, dark=dark) for width in (390, 1280) for dark in (False, True))
    browser.get(page)
    video, button = (f"document.querySelector('.loop {name}')" for name in ("video", "button"))
    wait_until(lambda: js(browser, f"return {video}.readyState") >= 2)
    assert js(browser, f"return [{video}.paused, {button}.textContent]") == [True, "play"]
    js(browser, f"{button}.click()")
    wait_until(lambda: js(browser, f"return {video}.currentTime") > 0.2)
    assert js(browser, f"return {button}.textContent") == "pause"
    js(browser, f"{video}.click()")
    wait_until(lambda: js(browser, f"return [{video}.paused, {button}.textContent]") == [True, "play"])
    assert faults(browser) == []


def test_the_box_lies_where_the_crop_was():
    whole = np.full((96, 192, 3), 200, np.uint8)
    source = SourceView(whole, 384, 192, (96, 0, 288, 192), whole[None])
    drawn = np.asarray(with_box(source, (768, 768)))
    assert drawn.shape == (384, 768, 3)
    assert (drawn[200, 100] == 60).all()  # 0.3 of 200
    assert (drawn[200, 300] == 200).all()
    assert tuple(drawn[200, 192]) == tuple(drawn[200, 575]) == BOX
    assert tuple(drawn[200, 191]) != BOX


def test_a_clip_that_was_moved_with_its_line_is_found_by_its_content(encoded, out, tmp_path):
    """Its record keeps the old name; `verify --reencode` finds it, too."""
    root = Path(shutil.copytree(encoded, tmp_path / "moved", ignore=shutil.ignore_patterns("out")))
    origin = json.loads((out / "origin.json").read_text())
    (out / "origin.json").write_text(json.dumps({**origin, "data_root": str(root)}))
    (root / "videos/a.mp4").rename(root / "z.mp4")
    (root / "videos/b.mp4").rename(root / "videos/a.mp4")  # under a name that was another's
    (root / "videos.txt").write_text("videos/c.mp4\nvideos/a.mp4\n./z.mp4\n")
    (root / "prompts.txt").write_text("a third caption\na second caption\na <b>bar</b> & a card\n")
    shown = make_preview(PreviewSettings(out=out)).shown
    told = [(one.row.source.removeprefix("./"), one.row.source_line) for one in shown]
    assert told == [("z.mp4", 3), ("videos/a.mp4", 2), ("videos/c.mp4", 3)]  # what is where it was, as recorded
    assert all(isinstance(one.source, SourceView) for one in shown)
    (difference,) = verify(out, reencode=1).differences
    assert (difference.source.removeprefix("./"), difference.largest) == ("z.mp4", 0)
    (root / "videos.txt").write_text("videos/c.mp4\nvideos/a.mp4\n")  # lists that do not pair up find nothing
    assert isinstance(make_preview(PreviewSettings(out=out)).shown[0].source, ClipFault)


def test_a_source_that_is_gone_or_changed_is_said(encoded, out, tmp_path):
    origin = json.loads((out / "origin.json").read_text())
    (tmp_path / "moved/videos").mkdir(parents=True)
    shutil.copy(encoded / "videos/a.mp4", tmp_path / "moved/videos/b.mp4")
    shutil.copy(encoded / "videos/b.mp4", tmp_path / "moved/videos/c.mp4")
    (out / "origin.json").write_text(json.dumps({**origin, "data_root": str(tmp_path / "moved")}))
    shown = make_preview(PreviewSettings(out=out)).shown
    assert [one.source for one in shown[:2]] == [
        ClipFault("the source is gone"), ClipFault("the source has changed since it was encoded"),
    ]  # fmt: skip
    assert isinstance(shown[2].source, SourceView)
    assert shown[0].psnr is None
    assert shown[0].decoded_FHWC.shape == (9, 64, 96, 3)
    result = CliRunner().invoke(app, ["preview", str(out), "--json"])
    told = json.loads(result.stdout)
    assert [one["reason"] != "" for one in told["samples"]] == [True, True, False]
    assert "the source is gone" in Path(told["page"]).read_text()


def test_a_folder_that_takes_no_page_is_said_before_anything_is_decoded(out, monkeypatch):
    monkeypatch.setattr("cogprep.commands.preview.make_preview", lambda _: pytest.fail("decoded first"))
    with pytest.raises(DiskError):
        run(PreviewSettings(out=out, to=Path("/proc/preview")))


def test_a_damaged_sample_is_named(out):
    _, number, row = choose_samples(list(records_in(out)), 1)[0]
    tar = out / f"{number:06d}.tar"
    data = bytearray(tar.read_bytes())
    data[row.offset + row.size // 2] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=f"sample {row.key} is damaged"):
        make_preview(PreviewSettings(out=out))


def test_another_vae_and_an_empty_folder_and_odd_numbers_are_refused(out, tmp_path):
    contract = read_contract(out)
    other = replace(contract, vae=replace(contract.vae, weights_sha256="0" * 64))
    with pytest.raises(ModelError, match="is not the one that encoded this folder"):
        Decoder(out, None, other)
    with pytest.raises(ShardError, match="nothing has been encoded there"):
        make_preview(PreviewSettings(out=tmp_path / "none"))
    with pytest.raises(SettingError, match="8N"):
        PreviewSettings(frames=10)
    with pytest.raises(SettingError, match="too small"):
        PreviewSettings(samples=0)


def test_samples_come_from_all_over_the_folder(out):
    records = list(records_in(out))
    assert [row.source_line for *_, row in choose_samples(records, 2)] == [1, 3]
    assert [row.source_line for *_, row in choose_samples(records, 1)] == [1]
    assert len(choose_samples(records, 100)) == 3


def test_psnr():
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert psnr(black, black) == 99
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_clean_cache_all_removes_the_pages(out):
    run(PreviewSettings(out=out))
    (out / "preview/notes.txt").write_text("mine")
    removed = {removal.path.name for removal in find_removals(out, everything=True, say=print)}
    assert {"index.html", "sheet-0.png"} <= removed
    assert "notes.txt" not in removed


def test_a_folder_that_takes_no_pages_is_one_message(out):
    with pytest.raises(DiskError, match="this is a file, not a folder") as caught:
        run(PreviewSettings(out=out, samples=1, to=out / "contract.json" / "pages"))
    assert "name another folder" in caught.value.fix


def test_a_preview_that_is_older_than_records_is_drawn_again(out):
    run(PreviewSettings(out=out, json=True))
    pages = out / "preview"
    (pages / ".cogtune.json").unlink()
    for name in ("notes.txt", "sheet-9.png"):
        (pages / name).write_text("mine")
    Image.new("RGB", (1600, 400)).save(pages / "sheet-7.png")
    foreign = {path: path.read_bytes() for path in pages.iterdir() if path.name not in ("index.html", "sheet-0.png")}
    run(PreviewSettings(out=out, samples=1, json=True))
    (pages / ".cogtune.json").unlink()
    removed = {removal.path.name for removal in find_removals(out, everything=True, say=print)}
    assert {"index.html", "sheet-0.png"} <= removed and not {path.name for path in foreign} & removed
    assert {path: path.read_bytes() for path in foreign} == foreign
    (pages / "index.html").write_text("mine")
    with pytest.raises(SettingError, match="did not make"):
        run(PreviewSettings(out=out, json=True))
