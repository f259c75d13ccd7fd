"""No command of cogprep changes a byte of what is not its own, whatever lies in its folder."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_driver import BUCKET, bring_up_to_date
from foreign_trees import Tree

from cogcommon.errors import CogError
from cogcommon.files.failures import machines_fault
from cogcommon.files.ownership import take_output
from cogprep.commands import clean_cache, preview
from cogprep.commands.index import index
from cogprep.commands.init import init
from cogprep.commands.verify import verify
from cogprep.encode.report import Report
from cogprep.plan import stale
from cogprep.plan.folder import check_contract, commit_contract, read_contract
from cogprep.plan.origin import read_origin
from cogprep.settings.shards import CleanSettings, PreviewSettings
from cogprep.store.locks import at_work
from cogprep.store.proof import A_PREVIEW, check_shards_output
from cogprep.store.shards import ShardWriter

CLIPS = ["a", "b", "c", "d", "e"]
NAMES = (
    *(f"{folder}{number:06d}.{kind}" for folder in ("", "val/") for number in (0, 1, 3) for kind in ("tar", "parquet")),
    "contract.json", "origin.json", "empty_caption.safetensors", "report.json", "report-1-of-2.json", "val", ".survey",
    "preview", "preview/index.html", "preview/sheet-0.png", "preview/sheet-1.png", "preview/.cogtune.json",
    ".cogtune.json", "000001.tar.new", "000001.parquet.new", ".report.json.17.tmp", "prompts.txt", "videos.txt",
    ".survey/0123456789abcdef0123456789abcdef.json", ".x.12345678901234567890.tmp",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(encoded_once, tmp_path_factory):
    """Folders that cogprep made, one whole and one of a run that was killed; and what a run writes into them."""
    top = tmp_path_factory.mktemp("made")
    origin, contract = read_origin(encoded_once / "out"), read_contract(encoded_once / "out")
    contract = dataclasses.replace(contract, settings={**contract.settings, "resolution": [str(BUCKET)]})
    empty = (encoded_once / "out" / "empty_caption.safetensors").read_bytes()
    report = Report(**{field.name: 0 for field in dataclasses.fields(Report)} | {"worker": "1/1"})

    def encode_into(out: Path) -> None:
        """What `cogprep encode` does to a folder; clips and latents are drawn."""
        check_shards_output(out, "--out")
        out.mkdir(exist_ok=True)
        with at_work(out):
            if check_contract(out, contract) is None:
                commit_contract(out, contract, empty)
            origin.write(out)
            bring_up_to_date(out, contract, CLIPS)
        report.write(out)

    whole, killed = top / "whole", top / "killed"
    for folder in (whole, killed):
        encode_into(folder)
    draw_pages(whole / "preview")
    writer = ShardWriter(killed, 7, contract, ())
    writer._stream.write(b"half")
    writer.abandon()
    (killed / "000001.parquet").unlink()
    (killed / ".survey").mkdir()
    return [whole, killed], encode_into


def draw_pages(folder: Path) -> None:
    pages = take_output(folder, A_PREVIEW, "--to")
    for name in ("index.html", "sheet-0.png", "sheet-1.png"):
        pages.commit_bytes(name, name.encode())


def commands(encode_into: Callable[[Path], None], monkeypatch) -> dict[str, Callable[[Path], object]]:
    for name, drawn in {"make_preview": None, "html_of": b"page", "draw_sheets": [b"sheet"], "_told": {}}.items():
        monkeypatch.setattr(preview, name, lambda *_, drawn=drawn: drawn)
    return {
        "encode": encode_into,
        "clean-cache": lambda out: clean_cache.run(CleanSettings(out=out, yes=True)),
        "clean-cache --all": lambda out: clean_cache.run(CleanSettings(out=out, yes=True, all=True)),
        "index": index,
        "verify": verify,
        "init": init,
        "preview": lambda out: preview.run(PreviewSettings(out=out, json=True)),
        "preview --to": lambda out: preview.run(PreviewSettings(out=out / "none", to=out, json=True)),
    }


def let_loose(trees: int, seed: int, made, monkeypatch, tmp_path) -> None:
    ours, encode_into = made
    # The drawn clips have no files, which a look at the data root would find missing.
    monkeypatch.setattr(stale.Wanted, "unknown", lambda _: "")
    monkeypatch.setattr(stale.Wanted, "has", lambda _, key, source, caption: source != "c.mp4")
    draw = random.Random(seed)
    refused = 0
    for number in range(trees):
        folder = tmp_path / "here"
        tree = Tree(folder, ours, NAMES, draw)
        name, run = draw.choice([*commands(encode_into, monkeypatch).items()])
        try:
            run(tree.top)
        except CogError:
            refused += 1
        except OSError as error:  # as the command line takes it
            assert machines_fault(error), tree.told()
            refused += 1
        assert not tree.touched(), f"{name}, tree {number} of seed {seed}: {tree.touched()} in {tree.told()}"
        shutil.rmtree(folder)
    assert 0 < refused < trees


def test_what_is_somebodys_stays_as_it_is(made, monkeypatch, tmp_path, capsys):
    let_loose(200, 1, made, monkeypatch, tmp_path)


@pytest.mark.full
def test_what_is_somebodys_stays_as_it_is_in_ten_thousand_trees(made, monkeypatch, tmp_path, capsys):
    let_loose(6700, 2, made, monkeypatch, tmp_path)
