"""On a terminal of 80 columns the long commands are never silent for long, and their live line never wraps.

A silence is as long as the command's first thread has computed and slept in it, as the kernel says (``/proc``, Linux).
What other programs take of the machine is not the command's: it counts for nothing that the thread was ready to run and
was not let, that it waited for a disk, or that the machine stood still.
"""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cogcommon.cli.stages import text_width
from workshop.draw import write_data_set

LONGEST_S = 2.0
FIRST_S = 1.0  # 0.4 here
LOOK_S = 0.05
SIZE = "9x32x48"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@dataclass(frozen=True)
class Recording:
    code: int
    text: str
    first_s: float
    longest_s: float
    meanwhile: str  # the line that stood for the longest

    @property
    def live(self) -> list[str]:
        """Every live line that was drawn."""
        return [line for line in self.text.split("\r") if line.endswith("\x1b[K") and line != "\x1b[K"]


def looked_at(process: int) -> tuple[bool, float]:
    """Whether the first thread of a process sleeps, and the seconds that it has computed so far."""
    told = Path(f"/proc/{process}/task/{process}/stat").read_text().rpartition(")")[2].split()
    return told[0] == "S", (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")


def record(folder: Path, *words: str) -> Recording:
    """Run a command on a terminal of 80 columns and 24 lines."""
    program = str(Path(sys.executable).with_name(words[0]))
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.chdir(folder)
        os.execve(program, [program, *words[1:]], os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"})
    told, silences = b"", []
    before = slept_s = 0.0
    last = time.monotonic()
    while True:
        spoken = select.select([terminal], [], [], LOOK_S)[0]
        now, (sleeps, computed_s) = time.monotonic(), looked_at(child)
        slept_s += min(now - last, LOOK_S) if sleeps else 0  # no more: we may have been stopped ourselves
        last = now
        if not spoken:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # it has closed
            break
        silences.append((computed_s - before + slept_s, told[-100:].decode(errors="replace")))
        told += part
        before, slept_s = computed_s, 0.0
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Recording(code, told.decode(), silences[0][0], *max(silences))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("silence")
    write_data_set(folder / "ds", 3, seed=3)
    return folder


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            f"cogprep encode --data-root ds --resolution {SIZE} --model tiny --holdout 1",
            ["checking the weights", "loading T5", "loading the VAE", "encoding: "],
        ),
        (
            "cogtrain lora --shards out/000000.tar --validate-shards out/val/000000.tar --steps 2 --out run "
            "--validate-videos 1",
            ["opening shards", "loading the transformer", "video 1/1: [1-9]", "training: ",
             "saving a checkpoint", "proving the export"],
        ),
        (
            "cogtrain generate --run run --steps 4 --prompt red",
            ["loading the model", "tuned video: ", "base video: "],
        ),
    ],
    ids=["encode", "lora", "generate"],
)  # fmt: skip
def test_what_takes_long_says_what_it_does(folder, words, named):
    """In their order: each command takes what the one before has made."""
    recording = record(folder, *words.split())
    assert recording.code == 0, recording.text[-3000:]
    print(
        f"{words[:16]}: first {recording.first_s:.2f} s, longest {recording.longest_s:.2f} s: {recording.meanwhile!r}"
    )
    assert "starting" in recording.live[0] and recording.first_s < FIRST_S
    assert recording.longest_s < LONGEST_S, recording.meanwhile
    assert all(text_width(line.removesuffix("\x1b[K")) < 80 for line in recording.live)
    for name in named:
        assert any(re.search(name, line) for line in recording.live), name
