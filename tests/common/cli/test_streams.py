"""What becomes of a command whose output can be written no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogcommon.cli.streams import Output

# Two commands, of which one only prints what the other writes to a file. Lines that are longer than any buffer.
PROGRAM = """
from dataclasses import dataclass
from pathlib import Path
from cogcommon.cli.command import add_command, make_app, run_app

@dataclass
class Nothing:
    pass

def work(settings):
    for line in range(3):
        print("x" * 100_000)
    Path("done").touch()

app = make_app("program", "A program.")
add_command(app, "work", Nothing, work, "Writes a file.")
add_command(app, "show", Nothing, work, "Prints.", only_prints=True)
run_app(app)
"""


def run(command, cwd, stdout):
    words = [sys.executable, "-c", PROGRAM, command]
    return subprocess.run(words, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)


def gone():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("full", [False, True])
def test_work_goes_on_without_its_output_and_says_so(full, tmp_path):
    if full and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = run("work", tmp_path, os.open("/dev/full", os.O_WRONLY) if full else gone())
    assert done.returncode == 0 and (tmp_path / "done").exists()
    assert done.stderr.count("\n") == 1 and "the standard output cannot be written" in done.stderr


def test_what_only_prints_ends_without_a_word(tmp_path):
    done = run("show", tmp_path, gone())
    assert not (tmp_path / "done").exists() and done.stderr == "" and done.returncode in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_the_outputs_not_the_folders(tmp_path):
    with open("/dev/full", "w") as full:
        done = run("show", tmp_path, full)
    assert done.returncode == 2 and "the disk is full\nwhere: the standard output\n" in done.stderr


def test_where_there_is_room_again_a_log_goes_on(tmp_path):
    """A pipe's reader does not come back."""
    out = Output(os.open("/dev/full", os.O_WRONLY))
    out.outlived = True
    out._told = True
    assert out.write(b"lost") == 4
    with (tmp_path / "log").open("w") as log:
        os.dup2(log.fileno(), out.fileno())
    assert out.write(b"kept") == 4 and (tmp_path / "log").read_text() == "kept"


ALONE = """
import os, subprocess, sys
from cogcommon.cli.streams import guard_output, result_alone
guard_output()
kept = sys.stdout
with result_alone(True) as tell:
    print("ours")
    kept.write("of a library that has kept the stream\\n")
    os.write(1, b"in C\\n")
    subprocess.run(["echo", "another process"], check=True)
    tell("result")
    sys.exit(3)
"""


def test_a_result_stands_alone_whatever_is_printed_beside_it():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (3, "result\n")
    assert sorted(done.stderr.splitlines()) == [
        "another process",
        "in C",
        "of a library that has kept the stream",
        "ours",
    ]
