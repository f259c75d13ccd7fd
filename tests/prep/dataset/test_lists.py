"""Lists: paired as they stand, or not at all, with every fault named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cogcommon.errors import DataRootError
from cogprep.dataset.lists import read_lists, with_token


def lay(root: Path, **lists: str | bytes) -> Path:
    for name, content in lists.items():
        data = content.encode() if isinstance(content, str) else content
        (root / f"{name}.txt").write_bytes(data)
    return root


def faults(root: Path, task="t2v", **names) -> list[str]:
    return [str(fault) for fault in read_lists(root, task=task, **names).faults]


def test_lines_are_paired(tmp_path):
    data = read_lists(lay(tmp_path, prompts="a cat\na dog\n", videos="a.mp4\nsub/b.mp4"), task="t2v").trusted()
    assert [(s.line, s.caption, s.source, s.image) for s in data.samples] == [
        (1, "a cat", "a.mp4", ""),
        (2, "a dog", "sub/b.mp4", ""),
    ]


def test_bom_crlf_and_trailing_newlines_are_no_content(tmp_path):
    lay(tmp_path, prompts="\ufeffa cat\r\na dog\r\n\r\n".encode(), videos="a.mp4\nb.mp4\n\n\n")
    assert [s.caption for s in read_lists(tmp_path, task="t2v").samples] == ["a cat", "a dog"]


def test_only_newlines_end_a_line(tmp_path):
    """str.splitlines would also cut at these, and shift every later pair."""
    lay(tmp_path, prompts="one\u2028still one\x0cand\x85\ntwo\n", videos="a.mp4\nb.mp4\n")
    assert [s.caption for s in read_lists(tmp_path, task="t2v").samples] == ["one\u2028still one\x0cand", "two"]


def test_byte_order_marks_and_zero_width_characters_are_no_content_wherever_they_stand(tmp_path):
    (tmp_path / "b\u200b.mp4").touch()  # but a name that has one is a name
    joined = "\u0645\u06cc\u200c\u0634\u0648\u062f \U0001f469\u200d\U0001f4bb"  # U+200C and U+200D have a meaning
    lay(
        tmp_path,
        prompts=f"\ufeffa cat\n\ufeffa\u200b dog\u2060 \n{joined}\n",
        videos="\u200ba.mp4\ufeff\nb\u200b.mp4\n\ufeffsub/c\u2060.mp4\n",
    )
    data = read_lists(tmp_path, task="t2v").trusted()
    assert [s.caption for s in data.samples] == ["a cat", "a dog", joined]
    assert [s.source for s in data.samples] == ["a.mp4", "b\u200b.mp4", "sub/c.mp4"]


def test_a_line_of_nothing_that_is_seen_is_blank(tmp_path):
    assert faults(lay(tmp_path, prompts="a\n\u200b \ufeff\nb\n", videos="a\nb\nc\n")) == [
        "prompts.txt:2: no caption yet for b"
    ]


def test_blank_lines_at_the_end_are_captions_to_come_where_clips_pair_with_them(tmp_path):
    assert faults(lay(tmp_path, prompts="a\n\n\n\n\n", videos="a.mp4\nb.mp4\nc.mp4\n\n")) == [
        "prompts.txt:2: no caption yet for b.mp4",
        "prompts.txt:3: no caption yet for c.mp4",
    ]
    assert faults(lay(tmp_path, prompts="a\n\n", videos="a.mp4\nb.mp4\nc.mp4\n")) == [
        "prompts.txt:2: blank line",
        "videos.txt:3: unpaired from here, or from an earlier line: prompts.txt has 2, videos.txt has 3 lines",
    ]


def test_a_list_in_utf_16_is_called_that(tmp_path):
    lay(tmp_path, prompts="a cat\n".encode("utf-16"), videos="a.mp4\n")
    assert faults(tmp_path) == ["prompts.txt: UTF-16, as Windows writes it; save the list as UTF-8"]


def test_all_faults_at_once(tmp_path):
    lay(tmp_path, prompts="a\n\nb\nc\n", videos="\na.mp4\nb.mp4\n", images=b"x.png\n\xff\n")
    assert faults(tmp_path, "i2v") == [
        "images.txt:2: not UTF-8; save the list as UTF-8",
        "prompts.txt:2: blank line",
        "prompts.txt:4: unpaired from here, or from an earlier line: prompts.txt has 4, videos.txt has 3 lines",
        "videos.txt:1: blank line",
    ]


def test_a_fault_yields_no_samples_and_one_message(tmp_path):
    data = read_lists(lay(tmp_path, prompts="a\n\nb\n", videos="a.mp4\nb.mp4\nc.mp4\n"), task="t2v")
    assert data.samples == ()
    with pytest.raises(DataRootError, match="1 clip without a caption yet") as caught:
        data.trusted()
    assert "prompts.txt:2: no caption yet for b.mp4" in str(caught.value)


def test_a_list_by_a_name_like_another_is_asked_for(tmp_path):
    lay(tmp_path, prompts="a\n", videos="a.mp4\n")
    data = read_lists(tmp_path, task="t2v", prompts="promts.txt", videos="clips.txt")
    assert [str(fault) for fault in data.faults] == [
        "clips.txt: the list is missing",
        f"promts.txt: the list is missing; did you mean {tmp_path / 'prompts.txt'}?",
    ]
    with pytest.raises(DataRootError) as caught:
        data.trusted()
    assert caught.value.fix.startswith("give each list whole")


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        ("a cat", "sks a cat"),
        ("sks a cat", "sks a cat"),
        ("sks, a cat", "sks, a cat"),
        ("sks", "sks"),
        ("sksy cats", "sks sksy cats"),
        ("", ""),
    ],
)
def test_the_word_in_front_of_every_caption_is_there_once(written, caption):
    assert with_token("sks", written) == caption and with_token("", written) == written


def test_missing_and_empty_lists(tmp_path):
    assert faults(tmp_path) == ["prompts.txt: the list is missing", "videos.txt: the list is missing"]
    lay(tmp_path, videos="a.mp4\n")
    assert faults(tmp_path) == [f"prompts.txt: the list is missing; to write it: cogprep init {tmp_path}"]
    lay(tmp_path, prompts="", videos="\n\n")
    assert faults(tmp_path) == ["prompts.txt: the list is empty", "videos.txt: the list is empty"]


def test_a_list_that_is_no_file_is_refused_and_not_waited_for(tmp_path):
    """A list is read more than once; a pipe, as of `--videos <(...)`, would be empty the next time."""
    os.mkfifo(tmp_path / "videos.txt")
    (tmp_path / "prompts.txt").mkdir()
    assert faults(tmp_path) == [
        "prompts.txt: a folder, not a file; save the list as a file",
        "videos.txt: not a regular file (a pipe, socket or device); save the list as a file",
    ]


def test_a_root_that_is_none(tmp_path):
    with pytest.raises(DataRootError, match="no such data root"):
        read_lists(tmp_path / "absent", task="t2v")


def test_images_only_for_i2v_and_only_where_there_are_some(tmp_path):
    lay(tmp_path, prompts="a\n", videos="a.mp4\n")
    assert read_lists(tmp_path, task="i2v").samples[0].image == ""
    assert faults(tmp_path, "i2v", images="stills.txt") == ["stills.txt: the list is missing"]
    lay(tmp_path, images="a.png\n")
    assert read_lists(tmp_path, task="i2v").samples[0].image == "a.png"
    t2v = read_lists(tmp_path, task="t2v")
    assert t2v.samples[0].image == "" and t2v.images_unused


def test_the_id_token_leads_every_caption(tmp_path):
    lay(tmp_path, prompts="a cat\n", videos="a.mp4\n")
    assert read_lists(tmp_path, task="t2v", id_token="DSNY").samples[0].caption == "DSNY a cat"


def test_a_name_that_no_file_can_have_is_no_bug(tmp_path):
    lay(tmp_path, prompts="a\n", videos="a.mp4\n")
    assert len(faults(tmp_path, "i2v", images="x" * 5000)) == 1
    assert not faults(tmp_path, "t2v", images="x" * 5000)
    with pytest.raises(DataRootError, match="no such data root"):
        read_lists(tmp_path / ("x" * 5000), task="t2v")
