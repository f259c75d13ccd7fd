"""A missing file: what is there instead, and in what it differs."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from cogprep.dataset.advice import in_quotes
from cogprep.source.clip import BadClip
from cogprep.source.source_file import open_named


@pytest.fixture
def root(tmp_path) -> Path:
    """Alone in its folder: what other tests have made beside ``tmp_path`` is near it, too."""
    root = tmp_path / "alone" / "ds"
    for name in (
        "videos/a.mp4", "videos/deep/b b.mp4", "videos/e\u0301te\u0301.mp4", "Screen Shot 3.04\u202fPM.mov",
        "videos/c.mp4", "stills/d.jpg", "captions/e.txt",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "videos.txt").write_text("videos/a.mp4\n")
    return root


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("a.mp4", "the file is missing; videos/a.mp4 is there"),
        ("b b.mp4", "the file is missing; videos/deep/b b.mp4 is there"),
        ("videos/b b.mp4", "the file is missing; videos/deep/b b.mp4 is there"),
        ("videos/A.MP4", "the file is missing; videos/a.mp4 is there, in other capitals"),
        ("Videos/a.mp4", "the file is missing; videos/a.mp4 is there, in other capitals"),
        ("videos/a.mov", "the file is missing; videos/a.mp4 is there"),
        ("videos/a", "the file is missing; videos/a.mp4 is there"),
        ("images/c.png", "the file is missing"),  # a first frame is no clip
        ("images/d.png", "the file is missing; stills/d.jpg is there"),
        ("videos/d.mov", "the file is missing"),
        ("videos/e.mov", "the file is missing"),
        ("videos/b  b.mp4", "the file is missing; videos/deep/b b.mp4 is there"),
        ("videos/deep/b\u00a0b.mp4", "the file is missing; videos/deep/b b.mp4 is there"),
        ("videos/a\u200e.mp4", "the file is missing; videos/a.mp4 is there"),
        ("Screen Shot 3.04 PM.mov", "the file is missing; Screen Shot 3.04\u202fPM.mov is there"),
        ('"videos/a.mp4"', "the file is missing; in quotes; videos/a.mp4 is there"),
        ("'a.mp4'", "the file is missing; in quotes; videos/a.mp4 is there"),
        ("“videos/a.mp4”", "the file is missing; in quotes; videos/a.mp4 is there"),
        ('"gone.mp4"', "the file is missing; in quotes"),
        ("videos\\a.mp4", "the file is missing; a Windows path; videos/a.mp4 is there"),
        (".\\videos\\a.mp4", "the file is missing; a Windows path; videos/a.mp4 is there"),
        ("C:\\work\\ds\\videos\\a.mp4", "the file is missing; a Windows path; videos/a.mp4 is there"),
        ("C:/work/ds/videos/a.mp4", "the file is missing; a Windows path; videos/a.mp4 is there"),
        ("\\\\server\\share\\videos\\a.mp4", "the file is missing; a Windows path; videos/a.mp4 is there"),
        ('"C:\\ds\\videos\\a.mp4"', "the file is missing; in quotes; a Windows path; videos/a.mp4 is there"),
        ("rclone://bucket/a.mp4", "the file is missing; an address, not a file: download it first"),
        ("videos/gone.mp4", "the file is missing"),
        ("nowhere/at/all.mp4", "the file is missing"),
        ("../gone/../x.mp4", "the file is missing"),
    ],
)
def test_what_is_there_instead(root, entry, told):
    with pytest.raises(BadClip) as caught:
        open_named(root / entry)
    assert str(caught.value) == told


def test_a_folder_of_frames_is_told_how_it_becomes_a_clip(root):
    with pytest.raises(BadClip, match=r"^a folder, not a file$"):
        open_named(root / "videos")
    for name in ("frames/1.PNG", "frames/2.PNG", "frames/cover.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    with pytest.raises(BadClip, match=r"a folder of pictures, .* -i 'CLIP/\*\.PNG' "):
        open_named(root / "frames")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_other_form_of_an_accent(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / unicodedata.normalize(other, "été.mp4")).write_bytes(b"x")
    if (tmp_path / unicodedata.normalize(form, "été.mp4")).exists():
        pytest.skip("this file system takes both forms for one name")
    with pytest.raises(BadClip, match="accents written in the other way"):
        open_named(tmp_path / unicodedata.normalize(form, "été.mp4"))


def test_a_name_that_no_file_can_have_is_one_reason(tmp_path):
    for entry in ("x" * 300, "y/" * 3000 + "z", "a.mp4/b", "\0"):
        with pytest.raises(BadClip):
            open_named(tmp_path / entry)


def test_captions_in_quotes():
    assert all(map(in_quotes, ('"a dog"', "“a dog”", "«a dog»", "'a dog'")))
    assert not any(map(in_quotes, ('"', 'a "dog"', '"a" dog', "a dog", "")))
