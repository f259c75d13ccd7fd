"""A program's end: its own exit code, whatever comes while the process leaves."""

import atexit
import io
import os
import sys
import threading

import pytest

from cogcommon.cli.leaving import run_and_leave


class Full(io.StringIO):
    def flush(self):
        raise OSError("no space left")


@pytest.fixture
def leave(monkeypatch):
    """leave(run) -> the code that the process would end with, after Ctrl-C at both places where it may wait."""

    def interrupted():
        raise KeyboardInterrupt

    codes = []
    monkeypatch.setattr(threading, "_shutdown", interrupted)
    monkeypatch.setattr(atexit, "_run_exitfuncs", interrupted)
    monkeypatch.setattr(os, "_exit", codes.append)
    return lambda run: run_and_leave(run) or codes[-1]


@pytest.mark.parametrize("code", [0, 2, 143])
def test_the_code_is_the_programs_own(leave, code):
    assert leave(lambda: sys.exit(code)) == code


def test_ctrl_c_outside_of_any_command_shows_no_traceback(leave):
    def interrupted():
        raise KeyboardInterrupt

    assert leave(interrupted) == 130


def test_a_program_that_was_started_with_closed_streams_ends_well(leave, monkeypatch):
    """`cogtrain lora ... >&- 2>&-`: Python has no streams then."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert leave(lambda: None) == 0


def test_output_that_is_lost_is_told_by_the_code(leave, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    assert leave(lambda: None) == 120
