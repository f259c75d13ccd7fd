"""Whatever a name holds, a terminal shows it and obeys nothing, a shell takes it, and JSON can hold it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.table import Table

from cogcommon.cli.names import command_line, json_text, plain, quoted, tars_in
from cogcommon.cli.terminal import Console, show_error, styled
from cogcommon.errors import CogError

ODD = [
    "a b",
    "it's",
    'say "x"',
    "$HOME `id` $(id); rm -rf & | > < * ? # ! ~",
    "[v2]",
    "[/x] [red]y[/] \\[bold]",
    ":dog: :warning:",
    "back\\slash\\",
    "\x1b[2Jgone\x07",
    "\x9b31m",
    "tab\there",
    "two\nlines",
    "\u202egnp.mp4",
    "zero\u200bwidth\ufeff",
    os.fsdecode(b"latin-\xe9"),
    "日本語 é e\u0301 👩\u200d💻",
    "-rf",
    "",
]


def printed(*things, **options) -> str:
    console = Console(width=200, file=io.StringIO(), force_terminal=True, **options)
    console.print(*things)
    return re.sub("\x1b\\[[0-9;]*m", "", console.file.getvalue())  # rich's own colours


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_name_is_printed_as_it_is_wherever_it_stands(name):
    table = Table(name, title=name, show_edge=False, box=None)
    table.add_row(name)
    for text in (printed(name), printed(styled("x ", (name, "bold"))), printed(table)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u200b\ufeff\ud800-\udfff]", text)
        if "\n" not in name and "\t" not in name:
            assert plain(name).strip() in text


def test_what_is_not_seen_is_written_out():
    assert plain("\x1b[2J a\u202eb\u200b \x9b") == "\\x1b[2J a\\u202eb\\u200b \\x9b"
    assert plain(os.fsdecode(b"\xe9.mp4")) == "\\xe9.mp4"
    assert plain("日本語\t👩\u200d💻\n") == "日本語\t👩\u200d💻\n"


@pytest.mark.parametrize("name", [name for name in ODD if name], ids=ascii)
def test_a_shell_takes_a_printed_command_as_the_words_that_it_was_made_of(name):
    line = command_line(
        sys.executable, "-c", "import os, sys; print(list(map(os.fsencode, sys.argv[1:])))", name, "end"
    )
    assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", line)
    told = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode()
    assert told.strip() == str([os.fsencode(name), b"end"])


def test_simple_words_stay_as_they_are_typed(tmp_path):
    assert command_line("rm", "out/000001.tar", "a-b_c.d") == "rm out/000001.tar a-b_c.d"
    assert quoted(tmp_path) == str(tmp_path)


@pytest.mark.parametrize("name", [name for name in ODD if name], ids=ascii)
def test_the_pattern_of_a_folders_shards_finds_them(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "000000.tar").touch()
    told = subprocess.run(["bash", "-c", f"ls -d {tars_in(folder)}"], capture_output=True, check=True).stdout
    assert told.rstrip(b"\n") == os.fsencode(folder / "000000.tar")


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_json_holds_every_name_and_is_safe_to_look_at(name):
    text = json_text({"name": name, name: [name]})
    assert json.loads(text) == {"name": name, name: [name]}
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text.replace("\n", ""))
    text.encode()


def test_an_error_is_printed_as_it_is(capsys):
    show_error(CogError("no [v2] \x1b[2J", where=":dog: [/x]", fix="`rm '[a]'`"))
    assert capsys.readouterr().err.splitlines() == ["error: no [v2] \\x1b[2J", "where: :dog: [/x]", "do:    `rm '[a]'`"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding_and_json_stays_json(encoding):
    name = "é 日本 👩\u200d💻" + os.fsdecode(b"\xff")
    code = (
        "from cogcommon.cli.terminal import *; from cogcommon.cli.names import json_text; "
        "import sys; print_in_any_encoding(); "
        f"print(json_text({name!a})); Console(stderr=True).print({name!a})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=True
    )
    assert json.loads(done.stdout.decode(encoding)) == name
    assert done.stderr.strip()
