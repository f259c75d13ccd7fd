"""Clips for the tests: a small data set drawn here, and real clips where COGTUNE_CLIPS names some."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cogcommon.media.video import write_mp4
from cogprep.commands.encode import encode
from cogprep.encode.report import Report
from cogprep.settings.encode import EncodeSettings

SIZE = "9x64x96"


def _draw_clip(path: Path, seed: int, *, frames: int = 20, height: int = 72, width: int = 128, fps: float = 8) -> Path:
    """Smooth coloured waves that move; every seed and every frame differs."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [
        np.stack([127 + 120 * np.sin((1 + channel) * x + y * (seed + 1) + time / 3) for channel in range(3)], -1)
        for time in range(frames)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, np.stack(waves).astype(np.uint8), fps)
    return path


def _lay_lists(root: Path, captions: list[str], videos: list[str], images: list[str] | None = None) -> None:
    (root / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    (root / "videos.txt").write_text("".join(f"{video}\n" for video in videos), encoding="utf-8")
    if images is not None:
        (root / "images.txt").write_text("".join(f"{image}\n" for image in images), encoding="utf-8")


@pytest.fixture(scope="session")
def draw_clip() -> Callable[..., Path]:
    """``draw_clip(path, seed, frames=, height=, width=, fps=)`` writes an mp4 of moving waves."""
    return _draw_clip


@pytest.fixture(scope="session")
def lay_lists() -> Callable[..., None]:
    """``lay_lists(root, captions, videos, images)`` writes prompts.txt, videos.txt and images.txt."""
    return _lay_lists


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Five clips, drawn once; copy before changing anything."""
    folder = tmp_path_factory.mktemp("drawn")
    for index in range(5):
        _draw_clip(folder / f"{index}.mp4", index)
    return folder


@pytest.fixture
def root(tmp_path: Path, drawn: Path) -> Path:
    """A data root of five clips with captions."""
    root = tmp_path / "ds"
    root.mkdir()
    for clip in drawn.glob("*.mp4"):
        (root / clip.name).write_bytes(clip.read_bytes())
    _lay_lists(root, [f"wave number {index}" for index in range(5)], [f"{index}.mp4" for index in range(5)])
    return root


@pytest.fixture(scope="session")
def encoded_once(drawn: Path, tmp_path_factory) -> Path:
    """A data root and its shards, made once: five clips, two a shard. Copy before changing anything."""
    folder = tmp_path_factory.mktemp("encoded")
    shutil.copytree(drawn, folder / "ds")
    _lay_lists(folder / "ds", [f"wave number {index}" for index in range(5)], [f"{index}.mp4" for index in range(5)])
    encode(_settings(folder))
    gc.collect()  # what nobody holds goes now: frozen, it would keep its files and mappings for ever
    gc.freeze()  # what is imported by now stays: each encode has the collector look at all that is not frozen
    return folder


@pytest.fixture
def encoded(encoded_once: Path, tmp_path: Path) -> Path:
    """A copy of `encoded_once`, with all times kept: ``ds`` and ``out``."""
    folder = tmp_path / "encoded"
    shutil.copytree(encoded_once, folder)
    origin = folder / "out" / "origin.json"
    origin.write_text(origin.read_text().replace(str(encoded_once), str(folder)))
    return folder


@pytest.fixture(scope="session")
def settings_of() -> Callable[..., EncodeSettings]:
    """``settings_of(folder, **changes)``: encode ``folder/ds`` to ``folder/out``, two samples a shard."""
    return _settings


def _settings(folder: Path, **changes) -> EncodeSettings:
    given = {
        "data_root": folder / "ds",
        "out": folder / "out",
        "model": "tiny",
        "resolution": [SIZE],
        "shard_samples": 2,
        "workers": 1,
    }
    return EncodeSettings(**(given | changes))


@pytest.fixture
def run_encode(root: Path, tmp_path: Path) -> Callable[..., Report]:
    """``run_encode(**settings)`` encodes the data root to ``tmp_path/out``, two samples a shard."""

    def run(**settings) -> Report:
        return encode(_settings(tmp_path, **settings))

    return run


@pytest.fixture(scope="session")
def real_clips() -> list[Path]:
    root = os.environ.get("COGTUNE_CLIPS")
    if not root:
        pytest.skip("COGTUNE_CLIPS names no folder with real clips (videos.txt, videos/)")
    return [Path(root) / line for line in (Path(root) / "videos.txt").read_text().split()]
