"""Running `encode` again: for each change, what is encoded, reused and dropped."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogcommon.errors import SettingError, ShardError
from cogcommon.shards.records import read_record
from cogprep.commands.encode import encode
from cogprep.commands.init import init

CAPTIONS = [f"wave number {index}" for index in range(5)]
CLIPS = [f"{index}.mp4" for index in range(5)]


@pytest.fixture
def again(encoded: Path, settings_of):
    """Run once more; gives (encoded, reused, dropped, rejected)."""

    def run(**changes) -> tuple[int, int, int, int]:
        report = encode(settings_of(encoded, **changes))
        return report.encoded, report.reused, report.dropped, report.rejected

    return run


def rows(folder: Path) -> dict[str, tuple[str, str]]:
    """Caption and clip of every sample, by key."""
    return {
        row.key: (row.caption, row.source)
        for path in sorted((folder / "out").glob("*.parquet"))
        for row in read_record(path).rows
    }


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "out").glob("*.tar"))}


def nothing(_root: Path, _lay: Callable, _draw: Callable) -> None:
    pass


def edit_a_caption(root: Path, lay: Callable, _draw: Callable) -> None:
    lay(root, ["a new caption", *CAPTIONS[1:]], CLIPS)


def replace_a_clip(root: Path, _lay: Callable, draw: Callable) -> None:
    draw(root / "2.mp4", 99)


def replace_a_clip_keeping_its_time(root: Path, _lay: Callable, draw: Callable) -> None:
    before = (root / "2.mp4").stat()
    draw(root / "2.mp4", 99)
    os.utime(root / "2.mp4", ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(root: Path, _lay: Callable, _draw: Callable) -> None:
    for clip in CLIPS:
        os.utime(root / clip)


def add_two(root: Path, _lay: Callable, draw: Callable) -> None:
    draw(root / "5.mp4", 50)
    draw(root / "6.mp4", 60)
    (root / "5.txt").write_text("five")
    (root / "6.txt").write_text("six")
    assert init(root, add=True).added == ["5.mp4", "6.mp4"]


def add_in_front(root: Path, lay: Callable, draw: Callable) -> None:
    draw(root / "new.mp4", 50)
    lay(root, ["new", *CAPTIONS], ["new.mp4", *CLIPS])


def remove_one(root: Path, lay: Callable, _draw: Callable) -> None:
    lay(root, CAPTIONS[:1] + CAPTIONS[2:], CLIPS[:1] + CLIPS[2:])


def remove_a_whole_shard(root: Path, lay: Callable, _draw: Callable) -> None:
    lay(root, CAPTIONS[2:], CLIPS[2:])


def reorder(root: Path, lay: Callable, _draw: Callable) -> None:
    lay(root, CAPTIONS[::-1], CLIPS[::-1])


def rename_a_clip(root: Path, lay: Callable, _draw: Callable) -> None:
    (root / "3.mp4").rename(root / "a name with spaces, dots . and ünïcode.mp4")
    lay(root, CAPTIONS, [*CLIPS[:3], "a name with spaces, dots . and ünïcode.mp4", CLIPS[4]])


def repeat_a_sample(root: Path, lay: Callable, _draw: Callable) -> None:
    lay(root, [*CAPTIONS, CAPTIONS[0]], [*CLIPS, CLIPS[0]])


def another_caption_for_a_clip(root: Path, lay: Callable, _draw: Callable) -> None:
    lay(root, [*CAPTIONS, "the same clip in other words"], [*CLIPS, CLIPS[0]])


def collide_in_stem(root: Path, lay: Callable, draw: Callable) -> None:
    draw(root / "other" / "0.mp4", 70)
    lay(root, [*CAPTIONS, CAPTIONS[0]], [*CLIPS, "other/0.mp4"])


@pytest.mark.parametrize(
    "change, expected",
    [
        (nothing, (0, 5, 0, 0)),
        (edit_a_caption, (1, 4, 1, 0)),
        (replace_a_clip, (1, 4, 1, 0)),
        (replace_a_clip_keeping_its_time, (1, 4, 1, 0)),
        (touch, (0, 5, 0, 0)),
        (add_two, (2, 5, 0, 0)),
        (add_in_front, (1, 5, 0, 0)),
        (remove_one, (0, 4, 1, 0)),
        (remove_a_whole_shard, (0, 3, 2, 0)),
        (reorder, (0, 5, 0, 0)),
        (rename_a_clip, (0, 5, 0, 0)),
        (repeat_a_sample, (1, 5, 0, 0)),
        (another_caption_for_a_clip, (1, 5, 0, 0)),
        (collide_in_stem, (1, 5, 0, 0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_change_encodes_and_drops_only_what_it_touches(change, expected, encoded, again, lay_lists, draw_clip):
    before = rows(encoded)
    change(encoded / "ds", lay_lists, draw_clip)
    assert again() == expected
    new, reused, dropped, _ = expected
    now = rows(encoded)
    assert len(now) == new + reused and len(before.keys() - now.keys()) == dropped
    listed = (encoded / "ds" / "prompts.txt").read_text().splitlines()
    assert sorted(caption for caption, _ in now.values()) == sorted(listed)
    kept = bytes_of(encoded)
    assert again() == (0, new + reused, 0, expected[3])
    assert bytes_of(encoded) == kept


def test_what_exists_keeps_its_shard_and_new_samples_take_free_numbers(encoded, again, lay_lists, draw_clip):
    before = bytes_of(encoded)
    remove_a_whole_shard(encoded / "ds", lay_lists, draw_clip)
    assert again() == (0, 3, 2, 0)
    assert bytes_of(encoded) == {name: before[name] for name in ("000001.tar", "000002.tar")}
    draw_clip(encoded / "ds" / "9.mp4", 90)
    lay_lists(encoded / "ds", [*CAPTIONS[2:], "nine"], [*CLIPS[2:], "9.mp4"])
    assert again() == (1, 3, 0, 0)
    assert {name: digest for name, digest in bytes_of(encoded).items() if name != "000000.tar"} == {
        name: before[name] for name in ("000001.tar", "000002.tar")
    }
    lay_lists(encoded / "ds", CAPTIONS, CLIPS)
    assert again() == (2, 3, 1, 0)
    assert bytes_of(encoded) == before


def test_a_dropped_sample_is_gone_and_its_neighbour_is_copied(encoded, again, lay_lists):
    before = read_record(encoded / "out" / "000000.parquet")
    lay_lists(encoded / "ds", [CAPTIONS[0], *CAPTIONS[2:]], [CLIPS[0], *CLIPS[2:]])
    again()
    after = read_record(encoded / "out" / "000000.parquet")
    assert [row.sha256 for row in after.rows] == [before.rows[0].sha256]
    assert (encoded / "out" / "000000.tar").stat().st_size < before.header.tar_size


def test_a_moved_holdout_is_never_in_both(encoded, again):
    assert again(holdout=2, yes=True)[0] == 2
    train = {row.source_sha256 for p in (encoded / "out").glob("*.parquet") for row in read_record(p).rows}
    val = {row.source_sha256 for p in (encoded / "out" / "val").glob("*.parquet") for row in read_record(p).rows}
    assert len(train) == 3 and len(val) == 2 and not train & val
    assert again(holdout=2) == (0, 5, 0, 0)
    assert again(holdout=0, yes=True) == (2, 3, 2, 0)


def test_other_weights_under_the_same_name_are_another_vae(encoded, again, tmp_path):
    import safetensors.torch

    from cogcommon.model.checkpoint import open_checkpoint

    model = tmp_path / "model"
    shutil.copytree(open_checkpoint("tiny").root, model)
    assert again(model=str(model)) == (0, 5, 0, 0)  # the same weights by another name are the same
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(SettingError, match="other settings") as caught:
        again(model=str(model))
    assert "vae.weights_sha256" in str(caught.value)


def test_a_tar_that_was_removed_is_made_again_and_one_that_was_cut_is_named(encoded, again):
    before = bytes_of(encoded)
    (encoded / "out" / "000001.tar").unlink()
    assert again() == (2, 3, 0, 0)
    assert bytes_of(encoded) == before
    tar = encoded / "out" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"000001.tar has \d+ bytes"):
        again()
