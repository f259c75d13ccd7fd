"""What leaves a folder of shards, and what never does: a line that is gone, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest

from cogcommon.errors import DataRootError, ModelError, SettingError
from cogcommon.shards.records import read_record
from cogprep.commands.clean_cache import run as run_clean
from cogprep.commands.encode import encode
from cogprep.commands.encode import run as run_command
from cogprep.commands.validate import validate
from cogprep.encode import encoder, part
from cogprep.plan import holdout as holdout_module
from cogprep.plan.holdout import Holdout, choose_holdout
from cogprep.plan.origin import read_origin
from cogprep.settings.encode import ValidateSettings
from cogprep.settings.shards import CleanSettings

CAPTIONS = [f"wave number {index}" for index in range(5)]
CLIPS = [f"{index}.mp4" for index in range(5)]


def tree(folder: Path) -> dict[str, str]:
    """Every file by content, but for the report of a run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


def clips_of(folder: Path) -> set[str]:
    return {row.source for path in folder.glob("*.parquet") for row in read_record(path).rows}


@pytest.fixture
def again(encoded, settings_of):
    return lambda **changes: encode(settings_of(encoded, **changes))


def test_a_line_whose_file_is_away_keeps_its_sample_until_the_line_goes(encoded, again, settings_of, capsys, lay_lists):
    out, before = encoded / "out", tree(encoded / "out")
    (encoded / "ds" / "4.mp4").rename(encoded / "away.mp4")
    (encoded / "ds" / "2.mp4").write_bytes(b"the first bytes of a copy")
    run_command(settings_of(encoded))
    said = capsys.readouterr().out
    assert "2 samples kept as encoded before" in said and "4.mp4" in said and "reused 3, kept 2" in said
    told = json.loads((out / "report.json").read_bytes())
    assert (told["kept"], told["reused"], told["dropped"], told["rejected"]) == (2, 3, 0, 0)
    assert [(sample["line"], sample["source"]) for sample in told["kept_samples"]] == [(3, "2.mp4"), (5, "4.mp4")]
    assert told["kept_samples"][1]["reason"] == "the file is missing"
    assert tree(out) == before
    with pytest.raises(DataRootError, match="2 clips kept, though"):
        run_command(settings_of(encoded, strict=True))
    run_clean(CleanSettings(out=out, yes=True))
    assert "2 samples kept" in capsys.readouterr().out and tree(out).items() >= before.items()
    lay_lists(encoded / "ds", CAPTIONS[:4], CLIPS[:4])
    report = again()
    assert (report.reused, report.kept, report.dropped) == (3, 1, 1)
    assert not (out / "000002.tar").exists()


def test_what_is_listed_again_meanwhile_is_neither_dropped_nor_counted_so(encoded, again, lay_lists, monkeypatch):
    before = tree(encoded / "out")
    lay_lists(encoded / "ds", CAPTIONS[:3], CLIPS[:3])
    plan = part.survey_and_plan

    def plan_and_list_again(*words):
        found = plan(*words)
        lay_lists(encoded / "ds", CAPTIONS, CLIPS)
        return found

    monkeypatch.setattr(part, "survey_and_plan", plan_and_list_again)
    assert again().dropped == 0
    assert tree(encoded / "out") == before


def test_with_the_whole_disk_away_everything_is_kept(encoded, again):
    before = tree(encoded / "out")
    for clip in (encoded / "ds").glob("*.mp4"):
        clip.unlink()
    report = again()
    assert (report.kept, report.dropped, report.rejected, report.encoded) == (5, 0, 0, 0)
    assert tree(encoded / "out") == before


def test_a_renamed_clip_is_known_by_its_caption_when_it_is_away(encoded, again, lay_lists):
    (encoded / "ds" / "3.mp4").rename(encoded / "ds" / "b.mp4")
    lay_lists(encoded / "ds", CAPTIONS, [*CLIPS[:3], "b.mp4", CLIPS[4]])
    assert again().reused == 5
    (encoded / "ds" / "b.mp4").unlink()
    report = again()
    assert (report.reused, report.kept, report.dropped) == (4, 1, 0)


def test_an_edited_caption_is_no_line_of_the_old_sample(encoded, again, lay_lists):
    """Line 1 has another caption, line 2 is away with a caption of its own: neither keeps line 1's old sample."""
    lay_lists(encoded / "ds", ["another", *CAPTIONS[1:]], CLIPS)
    (encoded / "ds" / "1.mp4").unlink()
    report = again()
    assert (report.encoded, report.reused, report.kept, report.dropped) == (1, 3, 1, 1)


@pytest.mark.parametrize("what", ["changed", "holdout", "other settings", "other data", "rejected"])
def test_validate_foretells_what_encode_does(what, encoded, again, settings_of, lay_lists, draw_clip, tmp_path):
    root, changes = encoded / "ds", {}
    if what == "changed":
        (root / "0.mp4").unlink()
        draw_clip(root / "9.mp4", 90)
        lay_lists(root, [*CAPTIONS[:3], "an edited caption", "nine"], [*CLIPS[:4], "9.mp4"])
    elif what == "holdout":
        changes["holdout"] = 2
    elif what == "other settings":
        changes["start"] = 0.1
    elif what == "other data":
        changes["data_root"] = other_root(tmp_path, encoded, lay_lists)
    else:
        damaged = bytearray((root / "3.mp4").read_bytes())
        for place in range(len(damaged) // 2, len(damaged) // 2 + 300, 7):
            damaged[place] ^= 0xFF
        (root / "3.mp4").write_bytes(damaged)
        assert again().rejected == 1
    fields = {field.name for field in dataclasses.fields(ValidateSettings)}
    given = {name: value for name, value in vars(settings_of(encoded, **changes)).items() if name in fields}
    before = tree(encoded / "out")
    verdict = validate(ValidateSettings(**given))
    assert tree(encoded / "out") == before
    said = [fault.what for fault in verdict.faults]
    if what in ("changed", "holdout"):
        report = again(yes=True, **changes)
        assert verdict.encode == {name: getattr(report, name) for name in ("reused", "kept", "dropped")} | {
            "new": report.encoded
        }
        assert said == (["the file is missing"] if what == "changed" else [])
        assert verdict.validation == len(clips_of(encoded / "out" / "val"))
        assert any("encode would ask first" in note for note in verdict.notes) == (what == "holdout")
    elif what == "rejected":
        assert len(said) == 1 and said[0].startswith("rejected when it was decoded") and verdict.encode["new"] == 0
    else:
        with pytest.raises((SettingError, DataRootError)) as caught:
            again(**changes)
        assert len(said) == 1 and caught.value.what in said[0]


def other_root(folder: Path, encoded: Path, lay_lists) -> Path:
    """Three clips to try something with; one of them is in the full folder, too."""
    root = folder / "try"
    root.mkdir()
    shutil.copy(encoded / "ds" / "0.mp4", root / "0.mp4")
    lay_lists(root, ["wave number 0", "a", "b"], ["0.mp4", "0.mp4", "0.mp4"])
    return root


@pytest.mark.parametrize("what", ["another root", "other lists", "no origin"])
def test_other_data_never_drops_anything(what, encoded, again, lay_lists, tmp_path, capsys):
    out, changes = encoded / "out", {}
    if what == "another root":
        changes["data_root"] = other_root(tmp_path, encoded, lay_lists)
    elif what == "other lists":
        (encoded / "ds" / "three.txt").write_text("0.mp4\n1.mp4\n")
        (encoded / "ds" / "captions.txt").write_text("wave number 0\nwave number 1\n")
        changes = {"videos": "three.txt", "prompts": "captions.txt"}
    else:
        (out / "origin.json").unlink()
        lay_lists(encoded / "ds", CAPTIONS[:4], CLIPS[:4])
    before = tree(out)
    with pytest.raises(DataRootError, match=r"would lose \d samples?") as caught:
        again(**changes)
    for way in ("--out ANOTHER", "--replace", "clean-cache"):
        assert way in caught.value.fix
    assert tree(out) == before
    run_clean(CleanSettings(out=out, yes=True))
    assert tree(out).items() >= before.items(), "what was refused is not called stale afterwards either"
    report = again(replace=True, **changes)
    assert report.dropped > 0 and read_origin(out) is not None
    assert again(**changes).dropped == 0


def test_a_data_root_that_moved_or_grew_elsewhere_goes_on(encoded, again, lay_lists, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(encoded / "ds", moved)
    assert again(data_root=moved).reused == 5
    assert read_origin(encoded / "out").data_root == str(moved)
    report = again(holdout=2, yes=True)  # from the first again; two only change sides, and are not lost
    assert (report.encoded, report.reused, report.dropped) == (2, 3, 2)
    lay_lists(moved, CAPTIONS[:4], CLIPS[:4])
    with pytest.raises(DataRootError, match="would lose 1 sample that is not in this data"):
        again(data_root=moved, holdout=1, yes=True)


@pytest.mark.parametrize("fails", ["T5", "VAE"])
def test_a_run_that_fails_changes_nothing(fails, encoded, again, settings_of, lay_lists, monkeypatch, tmp_path):
    out = encoded / "out"
    moved = tmp_path / "moved"
    shutil.copytree(encoded / "ds", moved)
    lay_lists(moved, [*CAPTIONS[:3], "new"], [*CLIPS[:3], CLIPS[3]])

    def fail(*_, **__):
        raise ModelError("no more memory")

    name = "TextEncoder" if fails == "T5" else "LatentEncoder"
    before = tree(out)
    with monkeypatch.context() as patch:
        patch.setattr(f"cogprep.encode.models.{name}", fail)
        with pytest.raises(ModelError):
            again(data_root=moved, replace=True, holdout=1, yes=True)
    assert {name: digest for name, digest in tree(out).items() if not name.startswith(".survey")} == before
    fresh = encoded / "fresh"
    with monkeypatch.context() as patch, pytest.raises(ModelError):
        patch.setattr("cogprep.encode.models.TextEncoder", fail)
        encode(settings_of(encoded, out=fresh))
    assert not (fresh / "origin.json").exists()


def test_the_holdout_is_remembered_and_moves_only_when_asked_to(encoded, settings_of, monkeypatch, capsys):
    out = encoded / "new"

    def run(**changes):
        return encode(settings_of(encoded, out=out, **changes))

    assert run(holdout=2).encoded == 5
    before = tree(out)
    for same in ({}, {"holdout": 2}):
        report = run(**same)
        assert (report.encoded, report.reused, report.dropped) == (0, 5, 0) and tree(out) == before
    for other, moves in (
        (0, "2 clips from validation to training, which are encoded again"),
        (3, "1 clip from training to validation, which is encoded again"),
    ):
        monkeypatch.setattr(holdout_module.sys, "stdin", io.StringIO())
        with pytest.raises(SettingError, match=moves) as caught:
            run(holdout=other)
        assert "no terminal" in caught.value.where and "--yes" in caught.value.fix
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(holdout_module.sys, "stdin", terminal)
        monkeypatch.setattr("builtins.input", lambda _: "")
        with pytest.raises(SettingError):
            run(holdout=other)
        assert tree(out) == before
    monkeypatch.setattr("builtins.input", lambda _: "y")
    report = run(holdout=3)
    assert (report.encoded, report.reused, report.dropped) == (1, 4, 1)
    assert len(clips_of(out / "val")) == 3 and not clips_of(out / "val") & clips_of(out)
    assert run().reused == 5


def test_the_choice_is_remembered_from_the_start_of_a_run(encoded, settings_of, monkeypatch):
    """Killed before the first shard, and gone on with without --holdout."""
    whole, out = encoded / "whole", encoded / "new"
    encode(settings_of(encoded, out=whole, holdout=2))

    class Killed(encoder.Pipeline):
        def encode(self, shards):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder, "Pipeline", Killed)
        encode(settings_of(encoded, out=out, holdout=2))
    assert encode(settings_of(encoded, out=out)).encoded == 5
    assert {name: digest for name, digest in tree(out).items() if "survey" not in name} == tree(whole)


def test_a_folder_of_before_holds_out_what_is_in_its_val(encoded, settings_of):
    out = encoded / "new"
    encode(settings_of(encoded, out=out, holdout=2))
    origin = json.loads((out / "origin.json").read_bytes())
    (out / "origin.json").write_text(json.dumps({k: v for k, v in origin.items() if not k.startswith("h")}))
    report = encode(settings_of(encoded, out=out))
    assert (report.reused, report.dropped) == (5, 0)


def test_choosing_takes_no_clip_from_where_it_is_without_need():
    a, b, c, d = (bytes([n]) * 32 for n in range(4))
    first = choose_holdout(2, Holdout(), {a, b, c}, ())
    assert first == Holdout(2, frozenset({a, b}))
    assert choose_holdout(None, first, {a, b, c, d}, {c}) == first
    assert choose_holdout(None, first, {c, d}, {c, d}) == first, "away is not gone"
    assert choose_holdout(2, first, {b, c, d}, {c}) == Holdout(2, frozenset({a, b, d})), "c was trained on"
    assert choose_holdout(3, first, {a, b, c}, {c}) == Holdout(3, frozenset({a, b, c})), "it was asked for"
    assert choose_holdout(1, first, {a, b, c}, {c}) == Holdout(1, frozenset({a}))
    assert choose_holdout(0, first, {a, b, c}, {c}) == Holdout(0, frozenset())
    assert choose_holdout(None, Holdout(), {a, b}, ()) == Holdout()
