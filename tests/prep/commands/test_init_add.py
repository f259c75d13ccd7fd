"""`cogprep init --add`: lines after those that the lists have, in all of them or in none, whenever it is killed; and
what it and `init` say comes next."""

from __future__ import annotations

import pytest
from PIL import Image

from cogcommon.errors import DataRootError
from cogcommon.files.atomic import guard_of
from cogcommon.files.locks import Busy, open_locked
from cogprep.commands.init import init, run
from cogprep.dataset import append
from cogprep.dataset.lists import HALF_ADDED, read_lists
from cogprep.settings.lists import InitSettings


class Killed(BaseException):
    pass


@pytest.fixture
def root(tmp_path):
    """Two clips with captions in lists, and two that came later: one with a caption, one without."""
    root = tmp_path / "ds"
    (root / "new").mkdir(parents=True)
    for name in ("b.mp4", "c.mp4", "new/a.mp4", "new/d.mp4"):
        (root / name).write_bytes(b"clip")
    (root / "new" / "d.txt").write_text("of d")
    (root / "videos.txt").write_text("c.mp4\nb.mp4\n")
    (root / "prompts.txt").write_text("of c\nof b\n")
    return root


def lists(root):
    return [(root / name).read_bytes() for name in ("videos.txt", "prompts.txt")]


def test_what_no_line_names_comes_after_lines_that_stay_byte_for_byte(root, capsys):
    (root / "videos.txt").write_bytes(b"\xef\xbb\xbf./c.mp4#t=0,1\r\n" + str(root / "b.mp4").encode() + b" \r\n\r\n")
    (root / "real.txt").write_bytes(b"  of c\x0b\rof b")
    (root / "real.txt").chmod(0o640)
    (root / "prompts.txt").unlink()
    (root / "prompts.txt").symlink_to("real.txt")
    run(InitSettings(ds=root, add=True))
    assert lists(root) == [
        b"\xef\xbb\xbf./c.mp4#t=0,1\r\n" + str(root / "b.mp4").encode() + b" \r\nnew/a.mp4\r\nnew/d.mp4\r\n",
        b"  of c\x0b\rof b\r\rof d\r",
    ]
    assert (root / "prompts.txt").is_symlink() and (root / "real.txt").stat().st_mode & 0o777 == 0o640
    shown = capsys.readouterr().out
    assert "added to prompts.txt and videos.txt, lines 3 to 4: new/a.mp4, new/d.mp4\n" in shown
    assert "captions: 1 from .txt files beside them\n" in shown and "(1 line: 3)" in shown
    before = lists(root)
    assert init(root, add=True).added == [] and lists(root) == before
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_a_clip_that_a_line_names_by_a_link_is_not_added_again(root):
    (root / "x.mp4").symlink_to("new/a.mp4")
    (root.parent / "way").symlink_to(root)
    (root / "videos.txt").write_text(f"c.mp4\n{root.parent / 'way' / 'new' / 'a.mp4'}\n")
    assert init(root, add=True).added == ["b.mp4", "new/d.mp4"]


def test_a_contact_sheet_of_a_film_is_no_picture_to_learn_from(root):
    (root / "cuts").mkdir()
    for name in ("my film-1.png", "my film-12.png", "another-1.png"):
        (root / "cuts" / name).write_bytes(b"picture")
    (root / "videos.txt").write_text("/films/my film.mkv#t=1,2\n/films/my film.mkv#t=2,3\n")
    assert init(root, add=True).added == ["b.mp4", "c.mp4", "new/a.mp4", "new/d.mp4", "cuts/another-1.png"]


def test_without_lists_it_writes_them_and_without_captions_it_names_what_does(root):
    (root / "prompts.txt").unlink()
    with pytest.raises(DataRootError, match=r"no prompts.txt to add to") as caught:
        init(root, add=True)
    assert caught.value.fix == f"first `cogprep init {root}`"
    (root / "videos.txt").unlink()
    assert init(root, add=True).written == ["videos.txt", "prompts.txt"]


def test_lists_that_disagree_are_refused_and_stay(root):
    (root / "prompts.txt").write_text("of c\n")
    before = lists(root)
    with pytest.raises(DataRootError, match="which clip a new line would belong to") as caught:
        init(root, add=True)
    assert "prompts.txt has 1, videos.txt has 2 lines" in caught.value.where and lists(root) == before


def test_a_clip_without_a_picture_waits_where_images_txt_pairs_each_with_one(root):
    (root / "images.txt").write_text("c.png\nb.png")
    (root / "new" / "d.png").write_bytes(b"picture")
    (root / "of no clip.png").write_bytes(b"picture")
    told = init(root, add=True)
    assert (told.added, told.unlisted) == (["new/d.mp4"], ["new/a.mp4"])
    assert (root / "images.txt").read_text() == "c.png\nb.png\nnew/d.png\n"
    assert "not added, since images.txt needs a picture of each clip's name: new/a.mp4; put them" in told.notes[0]
    (root / "images.txt").unlink()
    assert init(root, add=True).added == ["new/a.mp4", "of no clip.png"]


MOMENTS = range(8)  # before and after each of: the note, prompts.txt, images.txt, videos.txt


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_append_that_was_killed_is_finished_by_the_next(root, monkeypatch, moment):
    """With one more clip, and with another caption beside a clip, since it was killed."""
    for name in ("new/a.png", "new/d.png", "e.png"):
        (root / name).write_bytes(b"picture")
    (root / "images.txt").write_text("c.png\nb.png\n")
    passed = []

    def killed_at(step):
        def do(*given, **named):
            alone_there(root)
            for around in (lambda: None, lambda: step(*given, **named)):
                done = around()
                if len(passed) == moment:
                    raise Killed
                passed.append(step)
            return done

        return do

    with monkeypatch.context() as patched:
        patched.setattr(append, "commit_bytes", killed_at(append.commit_bytes))
        patched.setattr(append, "replace_list", killed_at(append.replace_list))
        with pytest.raises(Killed):
            init(root, add=True)
    faults = read_lists(root, task="i2v").faults
    in_the_middle = 3 <= moment < 7  # some list has its new lines, and not all have
    assert any(f"cogprep init {root} --add" in str(fault) for fault in faults) == in_the_middle
    assert in_the_middle or all(fault.kind == "uncaptioned" for fault in faults)
    (root / "e.mp4").write_bytes(b"clip")
    (root / "new" / "d.txt").write_text("in other words")
    told = init(root, add=True)
    begun = moment >= 3
    last = ["new/a.mp4", "new/d.mp4", "e.mp4"] if begun else ["e.mp4", "new/a.mp4", "new/d.mp4"]
    assert told.added == last and any("2 lines of them" in note for note in told.notes) == begun
    samples = read_lists(root, task="i2v").paired
    of_d = "of d" if begun else "in other words"
    captions = {"c.mp4": "of c", "b.mp4": "of b", "new/a.mp4": "", "new/d.mp4": of_d, "e.mp4": ""}
    assert [sample.source for sample in samples] == ["c.mp4", "b.mp4", *last]
    assert all(captions[one.source] == one.caption for one in samples)
    assert all(one.image == one.source.replace(".mp4", ".png") for one in samples)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def alone_there(root):
    """Whoever else writes captions has to wait now."""
    with pytest.raises(Busy):
        open_locked(guard_of(root / "prompts.txt"))


@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt"])
def test_a_list_that_a_person_has_changed_since_is_theirs(root, monkeypatch, name):
    step = append.replace_list

    def killed(path, *given):
        if path.name == "videos.txt":
            raise Killed
        return step(path, *given)

    with monkeypatch.context() as patched:
        patched.setattr(append, "replace_list", killed)
        with pytest.raises(Killed):
            init(root, add=True)
    (root / name).write_text((root / name).read_text().replace("c", "C", 1))
    before = lists(root)
    with pytest.raises(DataRootError, match="which clip a new line would belong to") as caught:
        init(root, add=True)
    assert lists(root) == before and not (root / HALF_ADDED).exists() and "--add" not in caught.value.where
    (root / "prompts.txt").write_text("of c\nof b\n")
    (root / "videos.txt").write_text("c.mp4\nb.mp4\n")
    assert init(root, add=True).added == ["new/a.mp4", "new/d.mp4"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"videos.txt": 3, "prompts.txt": {}}'])
def test_a_note_that_somebody_has_damaged_is_one_message(root, content):
    (root / HALF_ADDED).write_text(content)
    before = lists(root)
    with pytest.raises(DataRootError, match="cannot be finished") as caught:
        init(root, add=True)
    assert HALF_ADDED in caught.value.where and lists(root) == before
    (root / HALF_ADDED).unlink()
    assert init(root, add=True).added


@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt"])
def test_what_a_person_saves_just_before_the_first_list_is_replaced_stays(root, monkeypatch, name):
    step, calls = append.commit_bytes, []

    def after_a_person(*given):
        calls.append(given)
        if len(calls) == 1:
            (root / name).write_text((root / name).read_text().replace("c", "new/a", 1))
        return step(*given)

    monkeypatch.setattr(append, "commit_bytes", after_a_person)
    told = init(root, add=True)
    new = ["new/a.mp4", "new/d.mp4"] if name == "prompts.txt" else ["c.mp4", "new/d.mp4"]
    assert told.added == new and len(calls) == 2
    assert len(read_lists(root, task="t2v").paired) == 4 and "new/a" in (root / name).read_text().split("\n")[0]


# ---- what comes next


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([(72, 128), (72, 128)], "--resolution 49x480x720"),
        ([(128, 72), (96, 64)], "--resolution 49x720x480"),
        ([(128, 72), (72, 128)], "--resolution 49x480x720 49x720x480"),
    ],
)
def test_the_next_command_has_a_size_for_each_shape_of_clips(tmp_path, draw_clip, capsys, sizes, options):
    for number, (height, width) in enumerate(sizes):
        draw_clip(tmp_path / f"{number}.mp4", number, frames=2, height=height, width=width)
    run(InitSettings(ds=tmp_path))
    assert capsys.readouterr().out.endswith(f"\n  cogprep validate --data-root {tmp_path} {options}\n")


def test_the_next_command_has_sizes_for_pictures_and_a_model_for_images(tmp_path, draw_clip, capsys):
    draw_clip(tmp_path / "a.mp4", 0, frames=2, height=128, width=72)
    Image.new("RGB", (72, 128)).save(tmp_path / "b.png")
    Image.new("RGB", (128, 72)).save(tmp_path / "c.png")
    run(InitSettings(ds=tmp_path))
    assert capsys.readouterr().out.endswith(" --resolution 49x720x480 1x480x720 1x720x480\n")
    for name in ("videos.txt", "prompts.txt", "c.png"):
        (tmp_path / name).unlink()
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    run(InitSettings(ds=tmp_path))
    shown = capsys.readouterr().out
    assert shown.endswith(" --model THUDM/CogVideoX-5b-I2V --resolution 49x480x720\n")
    assert "for image-to-video, since images.txt is there:\n" in shown
