"""A program's first half second, in which it imports what it is made of."""

import signal
import subprocess
import sys

import pytest
from places import CHILDREN_PATH

INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('it went on')"


@pytest.mark.parametrize("program", ["cogprep", "cogtrain"])
@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_while_it_imports_ends_it_without_a_word(program, deaf, tmp_path):
    """Unless it is deaf to it, as what a shell starts in the background."""
    (tmp_path / "typer.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{CHILDREN_PATH}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler),
    )
    went_on = (1, "it went on\n")
    assert (done.returncode, done.stderr) == (went_on if deaf else (-signal.SIGINT, ""))
