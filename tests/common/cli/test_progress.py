"""The line that says what is going on: what it shows, what goes first when there is no room, when it is printed."""

import os
import pty
import subprocess
import sys
import threading

import pytest

from cogcommon.cli import progress
from cogcommon.cli.progress import Display
from cogcommon.cli.stages import Stage, live_line, text_width


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def worked(time: Time, seconds, total=100, noun="step") -> Stage:
    stage = Stage("training", total, noun, clock=time)
    for one in seconds:
        time.now += one
        stage.advance("loss 0.1234", "2.00 s/step", "lr 0.0001", "peak 20.1 GiB")
    return stage


def test_what_is_left_is_told_by_the_median_of_the_last_units(time):
    assert worked(time, []).left is None
    assert worked(time, [60, 2, 2, 2, 30, 2, 2], total=17).left == pytest.approx(20)  # a compilation, a validation
    slower = worked(time, [1] * 50 + [3] * 20)
    assert slower.left == pytest.approx(90)
    time.now += 2
    assert slower.left == pytest.approx(88), "it runs on while a unit is being made"
    time.now += 1000
    assert slower.left == pytest.approx(87), "but not past the unit"


def test_what_is_left_goes_by_the_seconds_that_were_measured_where_they_were(time):
    stage = worked(time, [60] * 3, total=10)
    stage.measured = 2.0
    assert stage.left == pytest.approx(14) and stage.rate == "30.0 steps/min"


def test_units_that_are_done_together_count_together(time):
    together = worked(time, [8, 0, 0, 0] * 5, total=40, noun="clip")
    assert together.left == pytest.approx(40)


def test_work_that_was_resumed_has_the_rest_left(time):
    stage = Stage("training", 100, "step", done=90, clock=time)
    time.now = 3
    stage.advance()
    assert stage.left == pytest.approx(27) and str(stage) == "training: 91/100 steps"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (20, "⠋ training: 3/100 s…"),
        (40, "⠋ training: 3/100 steps  left 3:14"),
        (60, "⠋ training: 3/100 steps  elapsed 0:06  left 3:14"),
        (80, "⠋ training: 3/100 steps  elapsed 0:06  left 3:14  loss 0.1234  2.00 s/step"),
        (120, "⠋ training: 3/100 steps  elapsed 0:06  left 3:14  loss 0.1234  2.00 s/step  lr 0.0001  peak 20.1 GiB  "
              "30.0 steps/min"),
        (160, "⠋ training: 3/100 steps  ────────────────────  elapsed 0:06  left 3:14  loss 0.1234  2.00 s/step  "
              "lr 0.0001  peak 20.1 GiB  30.0 steps/min"),
    ],
)  # fmt: skip
def test_the_least_important_goes_first(time, width, shown):
    assert live_line([Stage("starting", clock=time), worked(time, [2] * 3)], width) == shown
    assert text_width(shown) <= width


def test_work_inside_other_work_is_shown_with_it_where_there_is_room(time):
    stages = [worked(time, [2] * 3), Stage("video 1/2", 50, "step", done=17, clock=time)]
    assert live_line(stages, 100).startswith("⠋ training: 3/100 steps >  video 1/2: 17/50 steps  ")
    assert live_line(stages, 40) == "⠋ video 1/2: 17/50 steps  elapsed 0:00"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_whatever_it_is_of(time, width):
    for name in ("loading T5", "映像を読み込む" * 20, "a\x1b[2Jb\nc" * 20, "x" * 500):
        for ascii_only in (True, False):
            line = live_line([Stage(name, 10**12, "byte", clock=time)], width, ascii_only=ascii_only)
            assert 0 < text_width(line) <= width and "\x1b" not in line and "\n" not in line


def test_plain_lines_come_at_the_beginning_of_long_stages_and_every_ten_seconds(time, capfd):
    display = Display(time)

    def pass_by(seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            time.now += 0.25
            display.tick()

    display.start(thread=False)
    with display.stage("starting"):
        pass_by(3)
        with display.stage("loading T5"):
            pass_by(1.5)
        assert capfd.readouterr().err == ""
        with display.stage("loading the transformer"):
            pass_by(3)
        assert capfd.readouterr().err == "loading the transformer ...\n"
        with display.stage("encoding", 8, "clip") as bar:
            for _ in range(8):
                pass_by(4)
                bar.advance("waiting for the VAE" if bar.done else "")
    display.stop()
    assert capfd.readouterr().err.splitlines() == [
        "encoding: 0/8 clips",
        "encoding: 2/8 clips, elapsed 12 s, left 20 s, 15.0 clips/min, waiting for the VAE",
        "encoding: 5/8 clips, elapsed 22 s, left 10 s, 15.0 clips/min, waiting for the VAE",
        "encoding: 7/8 clips, elapsed 32 s, left 0.0 s, 15.0 clips/min, waiting for the VAE",
        "encoding: 8/8 clips, in 32 s",
    ]


def test_nothing_is_shown_to_a_library_user_or_by_another_rank(capfd, monkeypatch):
    with progress.stage("encoding", 2, "clip") as bar:
        bar.advance()
    monkeypatch.setenv("RANK", "1")
    threads = {*threading.enumerate()}  # of which some, other tests', may end meanwhile
    with progress.shown(), progress.stage("encoding", 2, "clip") as bar:
        bar.advance()
        assert {*threading.enumerate()} <= threads
    assert capfd.readouterr() == ("", "")


def test_others_lines_and_a_forked_child_leave_the_line_whole():
    """On a real terminal: each text of others begins on an empty line, and a child of fork draws nothing."""
    script = (
        "import os, sys, time\n"
        "from cogcommon.cli.progress import paused, say, shown, stage\n"
        "with shown(), stage('looking'):\n"
        "    time.sleep(0.6)\n"
        "    print('one'); say('two'); print('three', file=sys.stderr)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(0.6); os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    with paused():\n"
        "        print('four? ', end='', flush=True); time.sleep(0.6); print()\n"
        "print('end')\n"
    )
    ours, theirs = pty.openpty()
    running = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    told = b""
    try:
        while part := os.read(ours, 65536):
            told += part
    except OSError:
        pass  # a terminal that has closed
    os.close(ours)
    assert running.wait() == 0
    erased = "\r\x1b[K"
    text = told.decode()
    assert text.startswith("\r⠋ looking  elapsed 0:00\x1b[K\r")
    for said in ("one\r\n", "two\r\n", "three\r\n", "four? \r\n", "end\r\n"):
        before = text[: text.index(said)]
        assert before.endswith((erased, "\r\n")), said
    assert text.endswith("end\r\n") and "looking" not in text[text.index("four?") : text.index("four? \r\n") + 8]
