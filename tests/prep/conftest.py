"""Real clips for the tests that want them: a data root named by COGTUNE_CLIPS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_clips() -> list[Path]:
    root = os.environ.get("COGTUNE_CLIPS")
    if not root:
        pytest.skip("COGTUNE_CLIPS names no folder with real clips (videos.txt, videos/)")
    return [Path(root) / line for line in (Path(root) / "videos.txt").read_text().split()]
