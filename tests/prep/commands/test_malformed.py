"""Whatever lies in a data root or in a folder of shards, a command ends well or with one message: exit 0 or 2.

Small and seeded here; the campaigns of 5,000 lists and 1,000 files are in `make test-full`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import InlinePool
from PIL import Image

from cogcommon.errors import CogError
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogprep.commands import clean_cache, index, init, inspection, validate, verify
from cogprep.dataset.found import METADATA
from cogprep.dataset.lists import read_lists
from cogprep.dataset.probe import look_at
from cogprep.processes.pool import Pool
from cogprep.settings.encode import ValidateSettings
from cogprep.settings.lists import InitSettings
from cogprep.settings.shards import CleanSettings, IndexSettings, InspectSettings, VerifySettings
from cogprep.source.clip import ClipFault
from cogprep.video.decode import decode_clip

DEEP = "[" * 100_000 + "]" * 100_000
WRONG = [None, True, 0, -1, 1.5, 1e300, float("nan"), "", "x", "\x1b[2J", "\ud800", [], [1], {}, {"a": 1}, "9" * 5000]


def ends(command: Callable[[], object]) -> int:
    """The exit code of a command; anything but a `CogError` is a bug and passes through."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            command()
        except CogError as error:
            assert str(error).strip()
            return 2
    return 0


def commands(out: Path) -> dict[str, Callable[[], object]]:
    """What reads a folder of shards without decoding anything."""
    return {
        "inspect": lambda: inspection.run(InspectSettings(out=out)),
        "inspect --json": lambda: inspection.run(InspectSettings(out=out, json=True)),
        "verify": lambda: verify.run(VerifySettings(out=out)),
        "index": lambda: index.run(IndexSettings(out=out)),
        "clean-cache": lambda: clean_cache.run(CleanSettings(out=out, dry_run=True)),
        "clean-cache --all": lambda: clean_cache.run(CleanSettings(out=out, all=True, dry_run=True)),
    }


# ---- fields of contract.json and origin.json


def wrong_fields(told: dict) -> Iterator[tuple[str, dict]]:
    """The object with each field, also of the objects in it, missing or of each wrong kind."""
    for name, value in told.items():
        yield f"no {name}", {key: kept for key, kept in told.items() if key != name}
        for wrong in WRONG:
            yield f"{name}={wrong!r:.20}", told | {name: wrong}
        if isinstance(value, dict):
            for inner, changed in wrong_fields(value):
                yield f"{name}.{inner}", told | {name: changed}
    yield "one more", told | {"more": 1}


@pytest.fixture
def inline(monkeypatch) -> None:
    """No child processes, and one tokenizer."""
    tokenizer = open_checkpoint("tiny").load_tokenizer()
    monkeypatch.setattr(Checkpoint, "load_tokenizer", lambda _: tokenizer)
    for name in ("commands.validate", "plan.stale"):
        monkeypatch.setattr(f"cogprep.{name}.Pool", InlinePool)


def try_fields(folder: Path, every: int) -> Counter:
    """Exit codes of the commands for every ``every``-th wrong contract and origin."""
    out, endings = folder / "out", Counter()
    for name in ("contract.json", "origin.json"):
        path = out / name
        told = path.read_bytes()
        texts = [json.dumps(changed) for _, changed in wrong_fields(json.loads(told))]
        texts += ["", "null", "[]", "3", '"x"', "{", "{}", DEEP, '{"a":' * 50_000, "\ufeff"]
        for text in texts[::every]:
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            for run in commands(out).values():
                endings[ends(run)] += 1
        path.write_bytes(told)
    return endings


def test_every_field_of_contract_and_origin_at_wrong_types(encoded, inline):
    endings = try_fields(encoded, every=9)
    assert endings[0] and endings[2] and endings.total() > 400, endings


@pytest.mark.full
def test_every_field_at_every_wrong_type(encoded, inline):
    print(try_fields(encoded, every=1))


# ---- lists


def a_list(chance: random.Random, good: list[str], lines: int, oddness: float) -> bytes:
    """A list as an accident would write it: parts of good ones, odd characters, odd bytes.

    Args:
        good: what its lines are made of.
        oddness: the chance that a line has something odd in it; the file as a whole has it less often.
    """
    odd = [
        "\ufeff", "\u200b", "\0", "\x1b[2J", '"', "'", "\\", "C:\\a\\", "ftp://a/", "[/x]", "[red]", "\u2028", "\x85",
        "{a,b}", "~", "#t=1,2", "\t", "é", "e\u0301", ":dog:", "*", "%s", "{0}", "\U0001f469\u200d\U0001f4bb", " ",
        "#t=", "#t=,1", "#t=npt:0:00:01", "#t=2,1", "#t=nan", "#t=9,", "#t=0.5",
    ]  # fmt: skip
    told = []
    for _ in range(lines):
        text = chance.choice(good)
        for _ in range(chance.choice([1, 1, 2, 5]) if chance.random() < oddness else 0):
            at = chance.choice([len(text), chance.randrange(len(text) + 1)])
            text = text[:at] + chance.choice(odd) + text[at:]
        told.append(text)
    data = chance.choice(["\n", "\n", "\r\n", "\r"]).join(told).encode("utf-8", "surrogatepass")
    if chance.random() < oddness / 4:
        data = chance.choice(
            [data.decode().encode("utf-16"), chance.randbytes(chance.randrange(200)), data[:-1] + b"\xff"]
        )
    return data + chance.choice([b"", b"\n", b"\n\n\n"])


def try_lists(root: Path, count: int, seed: int) -> Counter:
    """Exit codes of validate; a third of the lists pair, or nearly do, so that what they say is looked at, too."""
    chance, endings = random.Random(seed), Counter()
    clips = sorted(path.name for path in root.glob("*.mp4"))  # the same draws everywhere
    Image.new("RGB", (96, 64)).save(root / "0.png")
    anything = [*clips, "0.png", "a caption", "", "x" * 300, "../ds/0.mp4", "/dev/null", "."]
    for _ in range(count):
        lines, paired = chance.choice([1, 2, 3, 5, 8]), chance.random() < 1 / 3
        for name, good in (("prompts.txt", ["a caption", "another"]), ("videos.txt", clips), ("images.txt", ["0.png"])):
            own = a_list(chance, good, lines, 0.05) if paired else None
            (root / name).write_bytes(own or a_list(chance, anything, chance.choice([0, lines, lines, 4]), 0.6))
        model = chance.choice(["tiny", "tiny-i2v"])
        settings = ValidateSettings(
            data_root=root, model=model, resolution=["17x64x96"], json=chance.random() < 0.5, short="repeat"
        )
        endings[ends(lambda settings=settings: validate.run(settings))] += 1
    return endings


def test_lists_of_any_kind_end_in_a_verdict(root, inline):
    endings = try_lists(root, 60, seed=1)
    assert endings.total() == 60 and endings[0] >= 3, endings


@pytest.mark.full
def test_5000_lists(root, inline):
    endings = try_lists(root, 5000, seed=2)
    print(endings)
    assert endings.total() == 5000 and endings[0] >= 250


# ---- tables of captions, for `cogprep init`


def a_table(chance: random.Random) -> tuple[str, bytes]:
    """A table of captions as an accident would write it: right rows, fields of wrong kinds, odd text, damage."""
    name = chance.choice(METADATA)
    odd = [*WRONG, "0.mp4", "../ds/1.mp4", "C:\\ds\\2.mp4", ["a", None, "b\nc"], {"path": "3.mp4"}, "a\0b", "#t=1", "/"]
    keys = ["file_name", "video_path", "Text", "caption", "prompt", "x_file_name", "", "id"]
    rows = [
        {"file_name": f"{number}.mp4", "caption": f"clip {number}"}
        | {chance.choice(keys): chance.choice(odd) for _ in range(chance.choice([0, 0, 1, 3]))}
        for number in range(chance.choice([0, 1, 5]))
    ]
    if name.endswith(".csv"):
        mark = chance.choice(",;\t|")
        lines = [mark.join(keys), *(mark.join(str(row.get(key, "")) for key in keys) for row in rows)]
        text = "\n".join(lines)
    elif name.endswith(".jsonl"):
        text = "\n".join(json.dumps(row) for row in rows)
    elif name.endswith(".parquet"):
        used = dict.fromkeys(key for row in rows for key in row) or {"file_name": None}
        words = {key: [str(row.get(key)).encode("utf-8", "replace").decode() for row in rows] for key in used}
        pq.write_table(pa.table(words), stream := io.BytesIO())
        data = stream.getvalue()
        return name, damaged(chance, data) if chance.random() < 0.4 else data
    else:
        text = json.dumps(chance.choice([rows, {"data": rows}, {str(row["file_name"]): row for row in rows}, *odd]))
    data = text.encode("utf-8", "surrogatepass")
    return name, damaged(chance, data + b" ") if chance.random() < 0.4 else data


def try_tables(root: Path, count: int, seed: int) -> Counter:
    chance, endings = random.Random(seed), Counter()
    for _ in range(count):
        for name in (*METADATA, "videos.txt", "prompts.txt"):
            (root / name).unlink(missing_ok=True)
        for name, data in (a_table(chance) for _ in range(chance.choice([1, 1, 2]))):
            (root / name).write_bytes(data)
        json_ = chance.random() < 0.5
        ending = ends(lambda json_=json_: init.run(InitSettings(ds=root, json=json_)))
        endings[ending] += 1
        lists = read_lists(root, task="t2v")
        assert (ending == 0) == (len(lists.columns) == 2)
        assert all("no caption yet" in fault.what for fault in lists.faults if ending == 0)
    return endings


def test_tables_of_captions_of_any_kind_end_in_lists_that_pair_or_in_a_message(root):
    endings = try_tables(root, 300, seed=1)
    assert endings[0] > 100 and endings[2] > 30, endings


@pytest.mark.full
def test_20000_tables_of_captions(root):
    print(try_tables(root, 20_000, seed=2))


# ---- damaged files


def damaged(chance: random.Random, data: bytes) -> bytes:
    """A file after an accident: cut, flipped, filled with zeros, shifted, or something else."""
    data, at = bytearray(data), chance.randrange(len(data) + 1)
    kind = chance.randrange(7)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(chance.choice([1, 1, 10, 100])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif kind == 3:
        del data[at : at + chance.randrange(1, 5000)]
    elif kind == 4:
        data[at:at] = chance.randbytes(chance.randrange(1, 5000))
    elif kind == 5:
        return chance.randbytes(chance.randrange(3000))
    else:
        return bytes(data) + chance.randbytes(100)
    return bytes(data)


def try_clips(clips: list[Path], folder: Path, count: int, seed: int) -> Counter:
    """Look at damaged clips and decode them; each is used or has a reason."""
    from cogcommon.model.families import Resolution
    from cogprep.video.cut import Cut

    chance, endings = random.Random(seed), Counter()
    size, cut = Resolution(9, 64, 96), Cut(short="repeat")
    paths = []
    for number in range(count):
        clip = chance.choice(clips)
        paths.append(folder / f"{number}{clip.suffix}")
        paths[-1].write_bytes(damaged(chance, clip.read_bytes()))
    with Pool(1) as pool:
        looks = [found[0] for found in pool.run(look_at, (([path], [size], cut, 8.0) for path in paths))]
        clips_ = list(pool.run(decode_clip, ((path, size, cut, 8.0, "key") for path in paths)))
    for found in (*looks, *clips_):
        assert not isinstance(found, ClipFault) or found.reason.strip()
        endings["rejected" if isinstance(found, ClipFault) else "used"] += 1
    return endings


def try_shards(folder: Path, count: int, seed: int) -> Counter:
    """Damage one file of a folder of shards at a time, and run every command on it."""
    chance, endings = random.Random(seed), Counter()
    whole, out = folder / "whole", folder / "out"
    out.rename(whole)
    for _ in range(count):
        shutil.copytree(whole, out)
        path = chance.choice(sorted(path for path in out.rglob("*") if path.is_file()))
        path.write_bytes(damaged(chance, path.read_bytes()))
        for run in commands(out).values():
            endings[ends(run)] += 1
        shutil.rmtree(out)
    return endings


def test_damaged_files_end_in_a_reason(encoded, inline, tmp_path):
    assert try_clips(sorted((encoded / "ds").glob("*.mp4")), tmp_path, 30, seed=1).total() == 60
    assert try_shards(encoded, 30, seed=1)[2] > 10


@pytest.mark.full
def test_1000_damaged_files(encoded, inline, tmp_path):
    print(try_clips(sorted((encoded / "ds").glob("*.mp4")), tmp_path, 500, seed=2), try_shards(encoded, 500, seed=2))


# ---- odd names, odd terminals, as a person starts it


def cogprep(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cogprep", *map(os.fsencode, map(str, words))], cwd=cwd, capture_output=True, text=True,
        errors="replace", env=os.environ | environment, timeout=300,
    )  # fmt: skip


def test_odd_names_in_a_folder_of_shards_are_passed_over(encoded, inline):
    before = {name: ends(run) for name, run in commands(encoded / "out").items()}
    for name in ("1².parquet", "7.parquet", "٣.tar", "0000001.parquet", "9" * 30 + ".tar", ".x." + "9" * 20 + ".tmp",
                 "000009.parquet.new.new", "[x].tar", "\x1b[2J.tar", os.fsdecode(b"\xff.tar"), "0.TAR"):  # fmt: skip
        (encoded / "out" / name).write_bytes(b"x")
    assert {name: ends(run) for name, run in commands(encoded / "out").items()} == before


def test_a_strange_place_and_a_poor_terminal(encoded):
    """A folder whose name is no UTF-8, on a terminal that knows ASCII only."""
    strange = encoded / os.fsdecode(b"\xff [v2] \xe9")
    (encoded / "out").rename(strange)
    shown = cogprep("inspect", strange, cwd=encoded, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert shown.returncode == 0 and "wave number 0" in shown.stdout, shown.stderr
    told = cogprep("inspect", strange, "--json", cwd=encoded, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert json.loads(told.stdout)["samples"]["train"] == 5
    (strange / "contract.json").write_text(DEEP)
    shown = cogprep("verify", strange, cwd=encoded, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert shown.returncode == 2 and shown.stderr.startswith("error: not a shard contract"), shown.stderr
    assert "Traceback" not in shown.stderr and "[v2]" in shown.stderr
