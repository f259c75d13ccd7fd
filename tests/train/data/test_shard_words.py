"""What the words of --shards stand for, where folders have names that look like patterns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogcommon.errors import CogError
from cogtrain.data.compatibility import lost_tars
from cogtrain.data.shard_words import expand
from cogtrain.data.shards import open_shards

ODD = ["set [v2] & more", "{a,b}", "a{1..3}", "x\\y", "*", "[!a]?", "~", "-x", " lead", "ünï", "a'b\"c", "#1", "100%"]


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Files `out/000000.tar` and `out/000001.tar` (empty) in a folder of each odd name, in one that is odd itself."""

    def make(name):
        home = tmp_path / "home [1] {2}" / name
        (home / "out").mkdir(parents=True)
        for number in range(2):
            (home / "out" / f"{number:06d}.tar").touch()
        (home / "out" / ".000002.tar").touch()  # a hidden file is half-written or not ours
        monkeypatch.chdir(home.parent)
        return home

    return make


def names(*words):
    return [Path(found.tar.path).resolve() for found in expand(words, "--shards")]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_that_exists_is_taken_literally(odd, name, monkeypatch):
    home = odd(name)
    tars = [home / "out" / "000000.tar", home / "out" / "000001.tar"]
    for base in (str(home), f"./{name}", name, f"{name}/../{name}"):
        assert names(f"{base}/out") == tars
        assert names(f"{base}/out/") == tars
        assert names(f"{base}/out/*.tar") == tars
        assert names(f"{base}/out/{{000000..000001}}.tar") == tars
        assert names(f"{base}/o*/00000[01].tar") == tars
        assert names(f"{base}/out/000001.tar", f"{base}/out/000000.tar") == tars[::-1]
    monkeypatch.chdir(home)
    assert names("out/*.tar") == tars
    assert names("{out,out}") == tars
    monkeypatch.chdir(home / "out")
    assert names("*.tar") == names("00000{0,1}.tar") == names(".") == tars


def test_a_file_that_exists_is_taken_literally_before_what_it_would_match(odd):
    home = odd("plain")
    (home / "0[01].tar").touch()
    (home / "00.tar").touch()
    (home / "{00,01}.tar").touch()
    assert names("plain/0[01].tar") == [home / "0[01].tar"]
    assert names("plain/{00,01}.tar") == [home / "{00,01}.tar"]
    assert names("plain/0[0-9].tar") == [home / "00.tar"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("out/{000000..000002.tar", "brace"),
        ("out/}.tar", "brace"),
        ("s3://bucket/{a", "brace"),
        ("http://localhost/{a.tar", "brace"),
        ("{" * 900 + "}" * 900, "brace|there is no"),
        ("{0..99999999999}.tar", "more than 1,000,000"),
        ("{0..1999}{0..1999}.tar", "more than 1,000,000"),
        ("", "names no shards"),
        ("  ", "names no shards"),
        ("out\n.tar", "control characters"),
        ("out/\x1b[31m.tar", "control characters"),
        ("out\x00.tar", "control characters"),
        ("out/\udcff.tar", "not UTF-8"),
        ("x" * 5000 + "/*.tar", "no shard"),
        ("a/" * 3000 + "*.tar", "no shard"),
        ("/dev/null/*.tar", "no shard"),
        ("[z-a].tar", "no shard"),
        ("**/" * 20 + "no.tar", "no shard"),
        ("1²", "not a shard|no shard"),
        ("~nobody-of-this-name/*.tar", "no shard"),
        ("s3:/typo/*.tar", "no shard"),
        ("://x", "no shard"),
        ("http://[::1/x.tar", "not a URL|cannot be read"),
    ],
)
def test_words_that_cannot_be_meant_end_in_one_message(tmp_path, monkeypatch, word, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1²").touch()
    with pytest.raises(CogError, match=says):
        open_shards([word])


def test_the_command_says_so_with_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cogtrain", "plan", "--gpu", "24GB", "--shards", os.fsdecode(b"out\xff/{0..1.tar")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error:"), done.stderr


def test_every_way_opens_real_shards(tmp_path, make_shards, monkeypatch):
    home = tmp_path / "set [v2] & more {x}"
    make_shards(home / "out")
    expected = open_shards([str(home / "out")]).fingerprint
    monkeypatch.chdir(home)
    for word in ("out", "out/*.tar", "out/{000000..000002}.tar", f"{home}/out/*.tar", f"file://{home}/out/*.tar"):
        shards = open_shards([word])
        assert shards.fingerprint == expected
        assert len({shards.extent(index).key for index in range(len(shards))}) == 6
    # Records whose names are no numbers of ours are nobody's lost shards.
    for stray in ("1².parquet", "12.parquet", "000009 copy.parquet", "000009.parquet.bak"):
        (home / "out" / stray).touch()
    assert lost_tars(shards) == []
    (home / "out" / "000009.parquet").touch()
    assert [Path(name).name for name in lost_tars(shards)] == ["000009.tar"]


@pytest.mark.parametrize("name", ["two\nlines", "\udcff"])
def test_a_folder_of_an_odd_name_is_trained_on_from_within(tmp_path, make_shards, monkeypatch, name):
    make_shards(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / name)
    with pytest.raises(CogError) as caught:
        open_shards([f"{tmp_path / name}/*.tar"])
    assert "(`cd`)" in caught.value.fix and "--shards '*.tar'" in caught.value.fix
    monkeypatch.chdir(tmp_path / name)
    assert len(open_shards(["*.tar"])) == 6
