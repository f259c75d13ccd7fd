import os
import re
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from cogcommon.cli.command import add_command, make_app
from cogcommon.cli.settings import check_least, resolve, setting
from cogcommon.errors import SettingError


@dataclass(frozen=True)
class Settings:
    shards: list[str] = setting([], "Shards.")
    layers: list[str] = setting(["a", "b"], "Layers.", commas=True)
    validate_shards: list[str] = setting([], "Held out.")
    steps: int | None = setting(None, "Steps.", shown="10 epochs")
    lr: float = setting(1e-4, "Learning rate.")
    strategy: Literal["ddp", "zero2"] = setting("ddp", "Strategy.")
    strict: bool = setting(False, "Strict.", only_with=("--validate-shards", "--strategy zero2"))
    out: Path | None = setting(None, "Folder.")
    config: Path | None = setting(None, "File.")


def run(*words):
    got = []
    app = typer.Typer(add_completion=False)
    add_command(app, "go", Settings, got.append, "Go.")
    add_command(app, "other", Settings, got.append, "Other.")
    result = CliRunner().invoke(app, ["go", *words])
    return result, (got[0] if got else None)


@pytest.mark.parametrize("words", ["", "stopped; what is in out stays"])
def test_ctrl_c_is_said_in_one_line(words):
    def stopped(_settings):
        raise KeyboardInterrupt(*[words] * bool(words))

    app = typer.Typer(add_completion=False)
    for name in ("go", "other"):
        add_command(app, name, Settings, stopped, "Go.")
    result = CliRunner().invoke(app, ["go"])
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == (words or "stopped; run the same command again") + "\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--shards", "a", "b", "c", "--validate-shards", "v", "w", "--steps", "2"],
        ["--shards=a", "b", "c", "--steps", "2", "--validate-shards", "v", "w"],
        ["--steps", "2", "--validate-shards", "v", "--shards", "a", "b", "--validate-shards", "w", "--shards", "c"],
        ["--validate-shards", "v", "--validate-shards", "w", "--shards", "a", "b", "c", "--steps=2"],
    ],
)
def test_an_unquoted_glob_reaches_the_option_it_stands_behind(words):
    result, settings = run(*words)
    assert result.exit_code == 0, result.output
    assert settings.shards == ["a", "b", "c"]
    assert settings.validate_shards == ["v", "w"]
    assert settings.steps == 2


@pytest.mark.parametrize("words", [["x", "--shards", "a"], ["--steps", "2", "x"], ["--shards", "a", "--strict", "x"]])
def test_any_other_stray_word_is_an_error(words):
    result, settings = run(*words)
    assert isinstance(result.exception, SettingError) and "'x' belongs to no option" in result.exception.what
    assert settings is None


def test_a_negative_number_is_a_value():
    assert run("--lr", "-1")[1].lr == -1


@pytest.mark.parametrize("words", [["c", "d", "e"], ["c,d,e"], ["c,", "d", ", e,"]])
def test_names_stand_between_spaces_or_commas(words, tmp_path):
    result, settings = run("--layers", *words, "--shards", "a,b.tar")
    assert result.exit_code == 0, result.output
    assert (settings.layers, settings.shards) == (["c", "d", "e"], ["a,b.tar"])
    (tmp_path / "config.toml").write_text(f"layers = {words}")
    assert resolve(Settings, {}, tmp_path / "config.toml").layers == ["c", "d", "e"]


def test_a_switch_can_be_switched_off():
    assert run("--strict", "--strategy", "zero2")[1].strict is True
    assert run("--no-strict", "--strategy", "zero2")[1].strict is False


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('lr = 1\nsteps = 5\nshards = ["a"]\nvalidate-shards = "v"\nout = "x"\nstrict = true\n')
    settings = run("--config", str(file), "--steps", "7")[1]
    assert (settings.lr, settings.steps, settings.shards, settings.strict) == (1.0, 7, ["a"], True)
    assert settings.validate_shards == ["v"] and settings.out == Path("x") and settings.strategy == "ddp"


def test_an_option_that_would_change_nothing_is_refused(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("strict = true\n")
    assert run("--config", str(file))[1].strict  # as a run writes down all of its settings
    file.write_text('validate-shards = "v"\n')
    assert run("--config", str(file), "--strict")[1].strict
    refused = run("--strict", "--strategy", "ddp")[0].exception
    assert str(refused).startswith("--strict changes nothing without --validate-shards or --strategy zero2")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stepz = 5", "did you mean 'steps'?"),
        ('steps = "five"', "'five' is not a whole number"),
        ('strategy = "zero9"', "'zero9' is not 'ddp' or 'zero2'"),
        ("lr = true", "lr"),
        ('config = "other.toml"', "names no other"),
        ("lr = ", "TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path, text, told):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(SettingError) as caught:
        resolve(Settings, {}, file)
    assert told in str(caught.value) and str(file) in str(caught.value)


def test_all_mistakes_of_a_file_are_named_at_once_with_their_lines(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('stepz = 5\nlr = 1e-4\n"strategy" = "zero9"\nconfig = "x"\n\n[ train ]\nout = "run"\nsteps = "x"\n')
    with pytest.raises(SettingError) as caught:
        resolve(Settings, {}, file)
    assert caught.value.what.splitlines() == [
        "5 mistakes",
        "  line 1: there is no setting 'stepz'; did you mean 'steps'?",
        "  line 3: strategy: 'zero9' is not 'ddp' or 'zero2'",
        "  line 4: a settings file names no other",
        "  line 6: [train] is a table, and settings stand in none",
        "  line 8: steps: 'x' is not a whole number",
    ]
    assert caught.value.where == f"--config {file}"
    assert caught.value.fix == "leave config out; take the line [train] out"


def test_a_table_of_settings_is_told_to_be_none(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsteps = 5\n")
    with pytest.raises(SettingError, match=r"\[train\] is a table") as caught:
        resolve(Settings, {}, file)
    assert (caught.value.where, caught.value.fix) == (f"--config {file}, line 1", "take the line [train] out")


@pytest.mark.parametrize("command", ["", "program go"])
def test_a_table_without_settings_is_one_mistake_and_names_are_told_by_help(tmp_path, command):
    file = tmp_path / "run.toml"
    file.write_text("[extra]\na = 1\nb = 2\n")
    with pytest.raises(SettingError) as caught:
        resolve(Settings, {}, file, command=command)
    assert (caught.value.what, caught.value.where, caught.value.fix) == (
        "[extra] is a table, and settings stand in none",
        f"--config {file}, line 1",
        "take [extra] out, and all that stands in it: none of that is a setting",
    )
    file.write_text("stepz = 1\nbogus = 1\nother = 1\n")
    with pytest.raises(SettingError, match="3 mistakes") as caught:
        resolve(Settings, {}, file, command=command)
    assert caught.value.fix == f"settings are called like the options: {f'{command} --help'.strip()} lists them"


def test_a_command_names_its_own_help_for_a_setting_of_a_file_that_there_is_not(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("bogus = 1\n")
    app = make_app("program", "Does it.")
    add_command(app, "go", Settings, print, "Go.")
    result = CliRunner().invoke(app, ["go", "--config", str(file)])
    assert "program go --help lists them" in str(result.exception)


def test_a_value_of_a_file_that_cannot_be_is_told_with_its_line(tmp_path):
    @dataclass(frozen=True)
    class Least:
        batch_size: int = setting(1, "Batch.")
        steps: int = setting(1, "Steps.")
        out: Path | None = setting(None, "Folder.")
        config: Path | None = setting(None, "File.")

        def __post_init__(self):
            check_least(self, batch_size=1, steps=1)

    file = tmp_path / "run.toml"
    for text, given, where in (
        ("steps = 2\nbatch-size = 0\n", {}, f"--batch-size; set in {file}, line 2"),
        ("steps = 2\nbatch-size = 0\n", {"batch_size": -1}, "--batch-size"),
        ("steps = 2\n", {"batch_size": -1}, "--batch-size"),
        ('out = "a\\nb"\n', {}, f"--out; set in {file}, line 1"),
    ):
        file.write_text(text)
        with pytest.raises(SettingError) as caught:
            resolve(Least, given, file)
        assert caught.value.where == where


def test_a_file_of_another_command_is_checked_and_what_only_that_has_is_left_out(tmp_path):
    @dataclass(frozen=True)
    class Look:
        steps: int = setting(1, "Steps.")
        config: Path | None = setting(None, "File.", file_of=Settings)

    file = tmp_path / "run.toml"
    file.write_text('steps = 3\nstrategy = "zero2"\n')
    assert resolve(Look, {}, file) == Look(steps=3)
    file.write_text('steps = 3\nstrategy = "zero9"\nlook = 1\n')
    with pytest.raises(SettingError, match="2 mistakes"):
        resolve(Look, {}, file)


def test_a_file_that_is_not_there_is_asked_for_by_a_name_that_is(tmp_path):
    (tmp_path / "mine.toml").touch()
    with pytest.raises(SettingError, match="No such file") as caught:
        resolve(Settings, {}, tmp_path / "nine.toml")
    assert caught.value.fix.startswith(f"did you mean {tmp_path / 'mine.toml'}? --config takes a TOML file")


def test_help_shows_every_option_with_its_default():
    text = " ".join(run("--help")[0].output.replace("│", " ").split())
    for word in ("--validate-shards", "[default: 10 epochs]", "[default: 0.0001]", "ddp|zero2"):
        assert word in text


def test_help_says_what_is_required_and_ends_with_examples():
    @dataclass(frozen=True)
    class Settings:
        root: Path | None = setting(None, "A folder.", shown="required")
        dry_run: bool = setting(False, "Only look.")

    app = make_app("program", "Does it.")
    add_command(app, "go", Settings, print, "Go there.\n\nAnd back.", ["program go --root [x]"])
    text = CliRunner().invoke(app, ["go", "--help"]).output
    assert "A folder. [required]" in text and "--no-dry-run" not in text
    assert text.index("And back.") < text.index("For example:") < text.index("program go --root [x]")
    assert "And back." not in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["--version"]).output.startswith("program 0.")


def test_a_positional_setting_is_a_bare_word(tmp_path):
    @dataclass(frozen=True)
    class Settings:
        out: Path = setting(Path("out"), "a folder", positional=True)
        names: list[str] = setting([], "some words")

    seen = []
    app = typer.Typer()
    add_command(app, "show", Settings, seen.append, "Show it.")
    for words in ([], ["here"], ["here", "--names", "a", "b"], ["--names=a", "b"]):
        assert CliRunner().invoke(app, words).exit_code == 0, words
    assert [(str(given.out), given.names) for given in seen] == [
        ("out", []), ("here", []), ("here", ["a", "b"]), ("out", ["a", "b"]),
    ]  # fmt: skip
    assert "[OUT]" in CliRunner().invoke(app, ["--help"]).output
    refused = CliRunner().invoke(app, ["one", "two"]).exception
    assert isinstance(refused, SettingError) and refused.what == "'two' belongs to no option"


def test_a_file_of_windows_is_read(tmp_path):
    """Notepad puts a byte order mark in front and \\r\\n at the end of every line."""
    file = tmp_path / "run.toml"
    file.write_bytes(b'\xef\xbb\xbfsteps = 3\r\nstrategy = "zero2"\r\n')
    assert resolve(Settings, {}, file).steps == 3


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("steps = 3\n".encode("utf-16"), "UTF-8"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b'out = "runs\\new"', "a control character (U+000A)"),
        (b'out = "a\\u001b[2J"', "a control character (U+001B)"),
        (b'shards = ["out", "v\\t*.tar"]', "a control character (U+0009)"),
    ],
    ids=["utf-16", "deep", "line break", "escape", "list"],
)
def test_a_file_that_cannot_be_meant_is_one_message(tmp_path, data, told):
    file = tmp_path / "run.toml"
    file.write_bytes(data)
    with pytest.raises(SettingError) as caught:
        resolve(Settings, {}, file)
    assert told in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_control_character_or_no_utf_8_on_the_command_line_is_refused():
    for given in ({"out": Path("a\nb")}, {"shards": ["a", "b\x7f"]}, {"shards": ["\udcff"]}):
        with pytest.raises(SettingError, match=r"control character|UTF-8"):
            resolve(Settings, given)
    assert resolve(Settings, {"out": Path("\udcff")}).out == Path("\udcff"), "a folder may have any name"

    @dataclass(frozen=True)
    class Spoken:
        prompt: str = setting("", "What to show.", prose=True)

    assert resolve(Spoken, {"prompt": "a dog\nruns"}).prompt == "a dog\nruns"


@pytest.fixture
def typed(monkeypatch):
    """``typed(program, *words) -> exit code``, in this process; what a program sets of its process is undone."""

    def go(program, *words):
        monkeypatch.setattr("sys.argv", [program, *words])
        before = dict(os.environ)
        with pytest.raises(SystemExit) as ended:
            import_module(f"{program}.cli").run()
        assert dict(os.environ) == before, "a program that is started next is not ours"
        return ended.value.code

    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # it may be `python -m pytest`
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield go
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("words", "what", "do"),
    [
        (["lora", "--learning-rate", "1"], "there is no option --learning-rate", "--lr"),
        (["lora", "--shard", "x"], "there is no option --shard", "--shards"),
        (["lora", "--data_root", "x"], "there is no option --data_root", "cogprep encode; cogtrain takes shards"),
        (["lora", "--caption_column", "x"], "no option --caption_column", "cogprep encode, as --prompts"),
        (["lora", "--gpus=8", "--gen_fps", "8"], "no options --gpus, --gen_fps", "--nproc N takes N"),
        (["lora", "--batch_size", "1"], "there is no option --batch_size", "--batch-size"),
        (["lora", "--epsilon", "1"], "there is no option --epsilon", "--eps"),
        (["lora", "--id_token", "x"], "there is no option --id_token", "cogprep encode; cogtrain takes shards"),
        (["lora", "--config_file", "x"], "there is no option --config_file", "--strategy zero2"),
        (["lora", "--nonsense", "1"], "there is no option --nonsense", " cogtrain lora --help lists them"),
        (["launch", "--mem", "4", "--", "lora"], "there is no option --mem", "--host"),
        (["launch", "--requeue", "--", "lora"], "there is no option --requeue", "leave it out"),
        (["train"], "there is no command 'train'", "cogtrain lora"),
        (["plann"], "there is no command 'plann'", "cogtrain plan"),
        (["lora", "--steps", "abc"], "--steps takes a whole number, not 'abc'", "--steps NUMBER"),
        (["lora", "--lr=x"], "--lr takes a number, not 'x'", "--lr NUMBER"),
        (["lora", "--strategy", "zro2"], "not 'zro2'", "--strategy zero2"),
        (["lora", "--steps", "3", "--steps=x"], "note: --steps is given twice; the last one counts", "--steps NUMBER"),
        (["lora", "--steps"], "--steps needs a value", "--steps VALUE"),
        (["lora", "stray"], "'stray' belongs to no option", "as --shards stray; cogtrain lora --help"),
        (["lora", "--steps", "3", "stray"], "'stray' belongs to no option", "behind its option; cogtrain lora --help"),
        (["compare", "a", "b"], "'b' belongs to no option", "leave it out (RUN is a), or put it behind its option"),
        (["compare", "--run", "a"], "there is no option --run", " cogtrain compare a"),
        (["compare", "r", "--prompt", "a", "red", "fox"], "'red fox' belongs to no option", '--prompt "a red fox"'),
        (["help"], "there is no command 'help'", "cogtrain --help"),
        (["-v"], "there is no option -v", "--version"),
    ],
)
def test_what_was_mistyped_is_said_in_our_words_with_what_was_meant(words, what, do, typed, capsys):
    code = typed("cogtrain", *words)
    said = capsys.readouterr().err
    assert code == 2 and what in said and do in said.split("do:")[1]


@pytest.mark.parametrize("program", ["cogprep", "cogtrain"])
def test_help_names_all_commands_under_headings_and_no_type_of_pythons(program, typed, monkeypatch, capsys):
    """Also as -h, which people type first."""
    monkeypatch.setenv("COLUMNS", "100")
    commands = [info.name for info in import_module(f"{program}.cli").app.registered_commands]
    for words in (["-h"], *([name, "-h"] for name in commands)):
        code = typed(program, *words)
        said = capsys.readouterr().out
        assert code == 0 and f"Usage: {program}" in said and not re.search("<(list|path|str|bool|int)", said)
        if words == ["-h"]:
            assert all(f"│ {name} " in said for name in commands) and "─ Commands ─" not in said
