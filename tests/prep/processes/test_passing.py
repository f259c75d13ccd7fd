"""What passes is no verdict: decode processes that are killed or hang, files that change while a run is on.

The processes are real, and so is what befalls them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pool_tasks
import pytest

from cogcommon.errors import DataRootError
from cogcommon.shards.records import read_record
from cogprep.commands.encode import encode
from cogprep.commands.encode import run as run_command
from cogprep.commands.verify import verify
from cogprep.encode import decoding as decoding_module
from cogprep.plan import survey as survey_module
from cogprep.processes import pool as pool_module
from cogprep.settings.encode import EncodeSettings
from cogprep.source.heartbeat import TIMEOUT_S


@pytest.fixture(autouse=True)
def _disturb(monkeypatch):
    monkeypatch.setattr(decoding_module, "decode_as_surveyed", pool_tasks.decode)
    monkeypatch.setattr(survey_module, "probe_clips", pool_tasks.probe)
    monkeypatch.setattr(pool_module, "answer_calls", pool_tasks.answer_calls)


def files_of(out: Path) -> dict[str, str]:
    """Every shard and record, by content."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("*.tar", "*.parquet")
        for path in sorted(out.rglob(kind))
    }


def leftovers(out: Path) -> list[str]:
    return sorted(
        path.name for path in out.rglob("*") if path.is_file() and (".new" in path.name or ".tmp" in path.name)
    )


# The clip, what befalls its process, how often. "decode" is the second time that a clip is opened.
DISTURBANCES = {
    "each kind": [("0", "decode-kill"), ("1", "probe-kill"), ("3", "decode-hang")],
    "a whole shard": [("2", "decode-kill"), ("3", "decode-kill")],
    "the first of every shard": [("0", "decode-kill"), ("2", "decode-kill"), ("4", "decode-kill")],
    "the last of a shard": [("1", "decode-kill")],
    "every one": [(str(n), "decode-kill") for n in range(5)],
    "every one, while it is probed": [(str(n), "probe-kill") for n in range(5)],
    "probing and decoding of one": [("1", "probe-kill"), ("1", "decode-hang")],
}
_IN_CI = ("each kind", "a whole shard")


@pytest.mark.parametrize(
    "which", [name if name in _IN_CI else pytest.param(name, marks=pytest.mark.full) for name in DISTURBANCES]
)
def test_the_next_run_ends_with_the_bytes_of_an_undisturbed_one(which, encoded, settings_of):
    undisturbed, out = files_of(encoded / "out"), encoded / "new"
    hangs = any("hang" in what for _, what in DISTURBANCES[which])
    settings = settings_of(encoded, out=out, clip_timeout=4.0 if hangs else TIMEOUT_S)
    orders = [encoded / "ds" / f"{clip}.mp4.{what}" for clip, what in DISTURBANCES[which]]
    for order in orders:
        order.write_text("9")
    first = encode(settings)
    hit = sum("decode" in what for _, what in DISTURBANCES[which])  # bytes alone give a clip its place
    assert (first.encoded, first.postponed, first.rejected) == (5 - hit, hit, 0)
    assert first.usable == (hit < 5), "a run that leaves everything to the next one has not done its work"
    assert [int(order.read_text()) for order in orders] == [7] * len(orders), "tried once more, and no more"
    assert all("killed" in s.reason or "no sign of life" in s.reason for s in first.postponed_samples)
    keys = {row.source for path in out.glob("*.parquet") for row in read_record(path).rows}
    assert not keys & {sample.source for sample in first.postponed_samples}
    for order in orders:
        order.unlink()
    second = encode(settings)
    assert (second.encoded, second.reused, second.dropped, second.postponed) == (hit, 5 - hit, 0, 0)
    assert files_of(out) == undisturbed and leftovers(out) == []
    assert verify(out).problems == []


def test_a_child_that_is_killed_once_costs_nothing(encoded, settings_of):
    for clip, what in (("1", "decode-kill"), ("3", "decode-hang"), ("2", "probe-kill"), ("4", "probe-hang")):
        (encoded / "ds" / f"{clip}.mp4.{what}").write_text("1")
    report = encode(settings_of(encoded, out=encoded / "new", clip_timeout=4.0))
    assert (report.encoded, report.postponed, report.rejected) == (5, 0, 0)
    assert files_of(encoded / "new") == files_of(encoded / "out")


def test_a_part_whose_probe_dies_costs_the_other_parts_of_its_film_nothing(encoded, settings_of, draw_clip, lay_lists):
    """They are probed together, twice; then each alone, so that only the one to blame has no bucket."""
    draw_clip(encoded / "ds" / "film.mp4", 9, frames=60)
    parts = ["film.mp4#t=0,2", "film.mp4#t=2,4", "film.mp4#t=4"]
    lay_lists(encoded / "ds", [f"part {n}" for n in range(3)], parts)
    order = encoded / "ds" / f"{parts[1]}.probe-kill"
    order.write_text("6")
    report = encode(settings_of(encoded, out=encoded / "new", resolution=["9x64x96", "9x96x64"]))
    assert (report.encoded, [one.source for one in report.postponed_samples]) == (2, parts[1:2])
    assert order.read_text() == "0"  # together, alone, and once more alone, each time twice


def test_of_several_buckets_a_clip_whose_probe_dies_twice_gets_its_place(encoded, settings_of, draw_clip):
    draw_clip(encoded / "ds" / "1.mp4", 7, height=128, width=72)
    sizes = ["9x64x96", "9x96x64"]
    encode(settings_of(encoded, out=encoded / "whole", resolution=sizes))
    for clip in "01":
        (encoded / "ds" / f"{clip}.mp4.probe-kill").write_text("2")
    assert encode(settings_of(encoded, out=encoded / "new", resolution=sizes)).encoded == 5
    assert files_of(encoded / "new") == files_of(encoded / "whole")
    assert [path.read_text() for path in sorted((encoded / "ds").glob("*.probe-kill"))] == ["0", "0"]


def test_a_clip_that_fails_every_time_holds_nothing_else_up(encoded, settings_of, capsys):
    out = encoded / "new"
    (encoded / "ds" / "0.mp4.decode-kill").write_text("99")
    settings = settings_of(encoded, out=out)
    run_command(settings)
    said = capsys.readouterr().out
    assert "1 clip left for the next run" in said and "killed" in said and "next: cogtrain" in said
    told = json.loads((out / "report.json").read_bytes())
    assert (told["postponed"], told["rejected"]) == (1, 0) and told["postponed_samples"][0]["line"] == 1
    before = files_of(out)
    again = encode(settings)
    assert (again.encoded, again.reused, again.postponed) == (0, 4, 1)
    assert files_of(out) == before and leftovers(out) == []
    with pytest.raises(DataRootError, match="1 clip left for the next run"):
        run_command(EncodeSettings(**{**vars(settings), "strict": True}))


def test_a_waiting_sample_keeps_its_place_through_other_changes(encoded, settings_of, lay_lists):
    """Its shard loses another sample before it is completed; what is left is as if it had never been there."""
    out, root = encoded / "new", encoded / "ds"
    captions, clips = [f"wave number {n}" for n in range(5)], [f"{n}.mp4" for n in range(5)]
    settings = settings_of(encoded, out=out, shard_samples=5)
    (root / "1.mp4.decode-kill").write_text("2")
    assert encode(settings).postponed == 1
    lay_lists(root, [*captions[:2], *captions[3:]], [*clips[:2], *clips[3:]])
    report = encode(settings)
    assert (report.encoded, report.reused, report.dropped) == (1, 3, 1)
    rows = read_record(out / "000000.parquet").rows
    assert [row.source for row in rows] == ["0.mp4", "1.mp4", "3.mp4", "4.mp4"]
    assert [row.offset for row in rows] == sorted(row.offset for row in rows)
    assert verify(out).problems == []


def test_rejected_clips_that_are_tried_again_get_their_old_place(encoded, settings_of, monkeypatch):
    undisturbed, out, settings = files_of(encoded / "out"), encoded / "new", settings_of(encoded, out=encoded / "new")
    monkeypatch.setattr(decoding_module, "decode_as_surveyed", pool_tasks.find_fault)
    (encoded / "ds" / "2.mp4.fault").touch()
    assert (encode(settings).rejected, encode(settings).rejected) == (1, 1)
    (encoded / "ds" / "2.mp4.fault").unlink()
    assert encode(settings).rejected == 1, "a verdict stands until somebody asks"
    again = encode(settings_of(encoded, out=out, retry_rejected=True))
    assert (again.encoded, again.rejected, again.dropped) == (1, 0, 0)
    assert files_of(out) == undisturbed


def test_a_killed_run_with_a_hole_in_its_shard_ends_with_the_same_bytes(encoded, settings_of, make_shards, tmp_path):
    """The temporary tar has samples 1 and 3 of a shard; sample 2 then belongs between them."""
    from cogprep.plan.completion import open_writer
    from cogprep.store.committed import read_tensors

    tar = make_shards(tmp_path / "whole", samples=3, per_shard=3)[0]
    record = read_record(tar.with_suffix(".parquet"))
    rows, folder = record.rows, tmp_path / "again"
    folder.mkdir()
    keys = [row.key for row in rows]
    killed = open_writer(folder, 0, record.header.contract, keys, completes=False)
    killed.add(rows[0], read_tensors(tar, rows[0]))
    killed.postpone(keys[1])
    killed.add(rows[2], read_tensors(tar, rows[2]))
    killed.abandon()
    writer = open_writer(folder, 0, record.header.contract, keys, completes=False)
    assert writer.left_behind() == {keys[0], keys[2]}
    writer.add_left_behind(rows[0])
    writer.add(rows[1], read_tensors(tar, rows[1]))
    writer.add_left_behind(rows[2])
    writer.commit()
    assert (folder / tar.name).read_bytes() == tar.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["000000.parquet", "000000.tar"]


def test_files_that_change_while_the_run_is_on_get_no_verdict(encoded, settings_of, monkeypatch):
    out, root = encoded / "new", encoded / "ds"
    whole = {path: path.read_bytes() for path in root.glob("*.mp4")}

    class Changing(decoding_module.Decoding):
        def begin(self, shards, beside):
            (root / "0.mp4").unlink()
            shutil.copy(root / "4.mp4", root / "1.mp4")
            (root / "2.mp4").write_bytes(b"the first bytes of a copy")
            os.utime(root / "3.mp4", ns=(1, 1))
            super().begin(shards, beside)

    with monkeypatch.context() as patch:
        patch.setattr("cogprep.encode.encoder.Decoding", Changing)
        report = encode(settings_of(encoded, out=out))
    assert (report.encoded, report.postponed, report.rejected) == (1, 4, 0)
    assert {sample.reason for sample in report.postponed_samples} == {
        "the file changed or went out of reach while the run was on"
    }
    for path, content in whole.items():
        path.write_bytes(content)
    assert encode(settings_of(encoded, out=out)).encoded == 4
    tars = {name: digest for name, digest in files_of(out).items() if name.endswith(".tar")}
    assert len(tars) == 3 and tars.items() <= files_of(encoded / "out").items()
