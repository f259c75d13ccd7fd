"""`cogprep caption`: blank lines are filled by a model that sees; what a person has written stays, whatever happens."""

from __future__ import annotations

import json
import threading
import time
from functools import partial

import numpy as np
import pytest
from corpus import cards, index_shown, write
from PIL import Image
from typer.testing import CliRunner

from cogcommon.errors import DataRootError, ModelError
from cogcommon.model.checkpoint import open_checkpoint
from cogprep.caption import blank_lines
from cogprep.caption import captioner as captioner_module
from cogprep.caption.blank_lines import Blank, CaptionList, shared_out
from cogprep.caption.captioner import Captioner
from cogprep.caption.frames import see, spread
from cogprep.caption.words import fit, tidy
from cogprep.cli import app
from cogprep.commands import caption as command
from cogprep.dataset import list_file
from cogprep.settings.lists import CaptionSettings
from cogprep.source.clip import ClipFault

FRAMES = 60


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    write(path, cards(frames=FRAMES), options={"crf": "10"})
    return path


@pytest.fixture
def root(tmp_path, clip):
    """Six lines: a clip twice, a part of it, a picture, one that is missing, and one that a person has written."""
    root = tmp_path / "ds"
    (root / "videos").mkdir(parents=True)
    (root / "videos" / "a.mp4").write_bytes(clip.read_bytes())
    Image.fromarray(cards()[3]).save(root / "photo.png")
    entries = ["a.mp4", "a.mp4", "a.mp4#t=1,2", "../photo.png", "none.mp4", "a.mp4#t=2"]
    (root / "videos.txt").write_text("".join(f"videos/{entry}\n" for entry in entries))
    (root / "prompts.txt").write_bytes(b"\r\n\r\n\r\n\r\n\r\n  A person's\x0bown, odd line \r\n")
    return root


def settings(root, llava, **more):
    return CaptionSettings(ds=root, model=str(llava), target="tiny", workers=1, **more)


def written(root, name="prompts.txt"):
    return (root / name).read_bytes().replace(b"\r\n", b"\n").split(b"\n")


def test_blank_lines_are_filled_and_written_ones_stay(root, llava, monkeypatch):
    words = ["caption", str(root), "--model", str(llava), "--target", "tiny", "--workers", "1", "--json"]
    done = CliRunner().invoke(app, [*words, "--prefix", "sks"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["written"], told["left"], told["taken"]) == (4, 1, 0)
    ((line, entry, why),) = told["faults"]
    assert (line, entry) == (5, "videos/none.mp4") and "missing" in why
    lines = written(root)
    assert lines[5:] == [b"  A person's\x0bown, odd line ", b""] and lines[4] == b""
    assert (root / "prompts.txt").read_bytes().count(b"\r\n") == 6
    captions = [line.decode() for line in lines[:4]]
    assert all(caption.startswith("sks ") and caption.isprintable() for caption in captions)
    assert len(set(captions)) == 4  # the second of one clip too, and of a part, and of a picture
    tiny = open_checkpoint("tiny")
    counts = [len(tiny.load_tokenizer()(caption)["input_ids"]) for caption in captions]
    assert max(counts) <= tiny.family.text_tokens
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    # Once more: only what is blank, and where nothing is, no model is asked for.
    before = (root / "prompts.txt").read_bytes()
    monkeypatch.setattr(command, "Captioner", lambda name: pytest.fail("loaded for nothing"))
    (root / "prompts.txt").write_bytes(before.replace(b"\r\n\r\n", b"\r\nby hand\r\n"))
    assert command.caption(settings(root, llava)).written == 0
    assert (root / "prompts.txt").read_bytes() == before.replace(b"\r\n\r\n", b"\r\nby hand\r\n")


def test_what_was_made_before_an_interruption_stays_and_the_next_run_goes_on(root, llava, monkeypatch):
    whole = Captioner.describe
    asked = []

    def twice(self, seen, instruction, **how):
        asked.append(instruction)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(self, seen, instruction, **how)

    monkeypatch.setattr(Captioner, "describe", twice)
    with pytest.raises(KeyboardInterrupt, match="stays: the same command goes on"):
        command.run(settings(root, llava, form="short"))
    first = written(root)
    assert all(first[:2]) and first[2:5] == [b"", b"", b""]
    done = command.caption(settings(root, llava, instruction="Say what you see:\nonly that."))
    assert done.written == 2 and written(root)[:2] == first[:2]
    assert "one sentence" in asked[0] and asked[3] == "Say what you see:\nonly that."


def test_a_line_that_somebody_writes_meanwhile_is_theirs(root, llava, monkeypatch):
    whole = Captioner.describe

    def slowly(self, seen, instruction, **how):
        lines = (root / "prompts.txt").read_bytes().split(b"\r\n")
        if not lines[1]:  # a person writes the first two, in place and without a lock
            (root / "prompts.txt").write_bytes(b"\r\n".join([b"mine", b"mine, too", *lines[2:]]))
        return whole(self, seen, instruction, **how)

    monkeypatch.setattr(Captioner, "describe", slowly)
    done = command.caption(settings(root, llava))
    assert (done.written, done.taken) == (2, 2)
    assert written(root)[:2] == [b"mine", b"mine, too"] and all(written(root)[2:4])


def many(tmp_path, count):
    (tmp_path / "videos.txt").write_text("".join(f"{n}.mp4\n" for n in range(count)))
    (tmp_path / "prompts.txt").write_text("\n" * count)
    return lambda: CaptionList(tmp_path, "prompts.txt", "videos.txt")


def test_two_captioners_share_a_list(tmp_path):
    lists, filled, filled_by, numbers = many(tmp_path, 60), [], {}, []

    def work(name):
        mine = lists()
        with mine.working() as number:
            numbers.append(number)
            both.wait()
            for blank in shared_out(mine.blanks(), number):
                if not mine.is_blank(blank):
                    continue
                time.sleep(0.005)  # a model takes longer
                if mine.fill(blank, f"{blank.entry} by {name}"):
                    filled.append(blank.line)
                    if filled_by.setdefault(name, blank.line) == blank.line:
                        both.wait()  # neither is done before the other has begun

    both = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert sorted(filled) == list(range(1, 61)) and sorted(numbers) == [0, 1]
    assert all(line.startswith(f"{n}.mp4 by ") for n, line in enumerate(lines)) and len(lines) == 60
    assert len({line[-1] for line in lines}) == 2 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("moment", ["_place", "_with_line", "state_of", "exchange"])
def test_what_a_person_saves_at_any_moment_stays(tmp_path, monkeypatch, moment, in_place):
    """Their editor saves just before one of our steps; they have not seen what we write."""
    captions = many(tmp_path, 4)()
    module = list_file if hasattr(list_file, moment) else blank_lines
    path, step, calls = tmp_path / "prompts.txt", getattr(module, moment), []

    def after_a_person(*given):
        calls.append(given)
        if len(calls) == 1:  # of state_of, the look before we replace the list
            new = path if in_place else tmp_path / "new"
            new.write_text("\n\nby hand\n\n")
            new.replace(path)
        return step(*given)

    monkeypatch.setattr(module, moment, after_a_person)
    assert captions.fill(Blank(2, "1.mp4", 0), "ours") and len(calls) > 1
    assert path.read_text() == "\nours\nby hand\n\n" and not list(tmp_path.glob(".*"))
    assert captions.fill(Blank(1, "0.mp4", 0), "and this") and path.read_text() == "and this\nours\nby hand\n\n"


def test_a_list_keeps_its_bytes_its_kind_and_its_rights(tmp_path):
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\na.mp4\n")
    (tmp_path / "real.txt").write_bytes(b"\xef\xbb\xbf\r  two \xc3\xa4\x0b\n\xe2\x80\x8b\r\n")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "prompts.txt").symlink_to("real.txt")
    captions = CaptionList(tmp_path, "prompts.txt", "videos.txt")
    assert captions.blanks() == [Blank(1, "a.mp4", 0), Blank(3, "a.mp4", 1)]
    for blank in captions.blanks():
        assert captions.fill(blank, f"number {blank.line}")
    assert (tmp_path / "real.txt").read_bytes() == b"\xef\xbb\xbfnumber 1\r  two \xc3\xa4\x0b\nnumber 3\r\n"
    assert (tmp_path / "prompts.txt").is_symlink() and (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640


def test_a_line_is_found_again_where_it_has_moved_to(tmp_path):
    lists = many(tmp_path, 3)
    blank = lists().blanks()[2]
    (tmp_path / "videos.txt").write_text("new.mp4\n0.mp4\n1.mp4\n2.mp4\n")
    (tmp_path / "prompts.txt").write_text("first\n\n\n\n")
    assert lists().fill(blank, "moved") and (tmp_path / "prompts.txt").read_text() == "first\n\n\nmoved\n"
    assert not lists().fill(blank, "again")
    (tmp_path / "prompts.txt").write_text("")  # an editor that cuts off blank lines
    assert len(lists().blanks()) == 4 and lists().fill(lists().blanks()[1], "0")
    assert (tmp_path / "prompts.txt").read_text() == "\n0\n\n\n"
    (tmp_path / "prompts.txt").write_text("\n")
    assert lists().fill(lists().blanks()[0], "first") and len(lists().blanks()) == 3
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(DataRootError, match="do not pair up") as caught:
        lists()
    assert "prompts.txt:2: unpaired" in caught.value.where


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("The video shows a red ring.\nIt rolls.", "A red ring. It rolls."),
        ("In this video, a man walks\x07 along.", "A man walks along."),
        ('**Caption:** "A short clip of waves."', "Waves."),
        ("Sure! Here is a description of the video:\n\n# Waves\n- They break.", "Waves They break."),
        ("This short clip features two dogs.", "Two dogs."),
        ("The video begins with a close-up of an eye.", "An eye."),
        ("In the video, we can see that snow falls.", "Snow falls."),
        ("Videos of cats play on a screen.", "Videos of cats play on a screen."),
        ("The image of a face fades.", "The image of a face fades."),
        ("\u200b \u2028", ""),
    ],
)
def test_an_answer_becomes_one_line_that_begins_with_its_subject(answer, caption):
    assert tidy(answer) == caption


def test_a_caption_ends_with_a_sentence_within_the_limit():
    tokenizer = open_checkpoint("tiny").load_tokenizer()
    tokens = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    text = "A red ring moves, and turns. Dr. Smith follows it! It is gone?"
    assert fit(text, tokens, 226) == text
    assert fit(text, tokens, tokens(text) - 1) == "A red ring moves, and turns. Dr. Smith follows it!"
    first = "A red ring moves, and turns."
    assert fit(text, tokens, tokens(first)) == first
    cut = fit(text, tokens, tokens(first) - 2)
    assert cut.endswith(".") and first.startswith(cut[:-1]) and tokens(cut) <= tokens(first) - 2
    assert tokens(fit("x" * 500, tokens, 20)) <= 20
    assert tidy("One is whole. Two is no", whole=False) == "One is whole."


def test_frames_are_spread_over_the_clip_or_its_part(clip, tmp_path):
    assert spread(tuple(n / 10 for n in range(10)), 0.1, 5) == ([1, 3, 5, 7, 9], 5.0)
    assert spread((0.0, 0.1, 0.9), 0.1, 4) == ([1], 1.0)  # one that stays is shown once
    for place, (first, last) in {"": (0, 60), "#t=1,2": (24, 48)}.items():
        seen = see(clip.with_name(clip.name + place), 4, 448)
        step = (last - first) / 4
        shown = [index_shown(frame) * FRAMES / 30 for frame in seen.frames_FHWC]
        assert shown == pytest.approx([first + step * (n + 0.5) for n in range(4)], abs=1)
        assert seen.fps == pytest.approx(4 / ((last - first) / 24)) and not seen.still
    assert see(clip, 4, 72).frames_FHWC.shape == (4, 48, 72, 3)
    Image.new("RGB", (900, 300), "red").save(tmp_path / "p.PNG")
    seen = see(tmp_path / "p.PNG", 4, 450)
    assert seen.still and seen.frames_FHWC.shape == (1, 150, 450, 3) and (seen.frames_FHWC == [255, 0, 0]).all()
    more = [Image.new("RGB", (96, 64), colour) for colour in ("blue", "green", "white")]
    Image.new("RGB", (96, 64)).save(tmp_path / "moving.png", save_all=True, append_images=more, duration=250)
    seen = see(tmp_path / "moving.png", 4, 448)
    assert not seen.still and len(seen.frames_FHWC) == 4 and seen.fps == pytest.approx(4)  # as encode takes it
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert isinstance(see(tmp_path / "bad.jpg", 4, 72), ClipFault)


def test_a_model_that_cannot_be_used_is_told_in_one_message(tmp_path, llava, monkeypatch):
    def refused(name, what):
        with pytest.raises(ModelError, match=what) as caught:
            Captioner(str(name))
        return caught.value

    text = tmp_path / "bert"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "bert"}')
    assert "Qwen" in refused(text, r"no vision-language model \(bert\): it cannot see").fix
    refused(tmp_path / "none", "no model")
    assert "write the captions yourself" in refused("tiny", "makes videos, and cannot see them").fix
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in llava.iterdir():
        if not file.name.startswith("chat_template"):
            (mute / file.name).write_bytes(file.read_bytes())
    refused(mute, "no chat template")
    monkeypatch.setattr(captioner_module, "free_host_memory", lambda: 10**9)
    assert "a smaller one" in refused(llava, "too little memory .* it takes 1.6.* and 1 GB are free").fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct" in refused("Qwen/Qwen2.5-VL-3B-Instruct", "is not here").fix
    many(tmp_path, 1)
    with pytest.raises(ModelError, match="THUDM/CogVideoX-2b is not here") as caught:
        command.caption(CaptionSettings(ds=tmp_path, model=str(llava), target="THUDM/CogVideoX-2b"))
    assert "--target tiny" in caught.value.fix and "--model" not in caught.value.fix
    with pytest.raises(ModelError, match=r"the captioning model .* is not here") as caught:  # both are missing
        command.caption(CaptionSettings(ds=tmp_path))
    assert (
        "--target" not in str(caught.value) and "by hand, each into its blank line of prompts.txt" in caught.value.fix
    )


def test_a_model_that_takes_videos_gets_one(qwen, root):
    captioner = Captioner(str(qwen))
    describe = partial(captioner.describe, instruction="Say what you see.", tokens=24)
    seen = see(root / "videos/a.mp4", 8, 448)
    inputs = captioner._inputs(seen, "Say what you see.")
    assert inputs["video_grid_thw"][0, 0] == 4 and "image_grid_thw" not in inputs  # two frames a token
    answer, _ = describe(seen)
    assert answer == describe(seen)[0] != describe(seen, seed=1)[0]
    shuffled = type(seen)(np.ascontiguousarray(seen.frames_FHWC[::-1]), seen.fps, still=False)
    assert describe(shuffled)[0] != answer
    assert "image_grid_thw" in captioner._inputs(see(root / "photo.png", 8, 448), "Say what you see.")
    assert command.caption(settings(root, qwen)).written == 4
