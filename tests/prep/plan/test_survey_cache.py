"""What one worker found out about clips, no other has to: unless anything changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from in_process import InlinePool

from cogcommon.model.families import Resolution
from cogprep.commands.encode import encode
from cogprep.dataset.probe import Probed
from cogprep.plan import probe_cache
from cogprep.plan import survey as survey_module
from cogprep.plan.probe_cache import SurveyCache
from cogprep.plan.slice import Slice
from cogprep.source.clip import ClipFault, Hashed
from cogprep.store.proof import SURVEY

SOURCES = [f"{index}.mp4" for index in range(20)]


class Place:
    def __init__(self, folder: Path) -> None:
        self.root, self.out = folder / "ds", folder / "out"
        self.root.mkdir()
        self.out.mkdir()
        self.looked: list[str] = []
        for source in SOURCES:
            (self.root / source).write_bytes(source.encode())

    def probe(self, paths: list[Path]) -> list[Probed | ClipFault]:
        return [*map(self._probe, paths)]

    def _probe(self, path: Path) -> Probed | ClipFault:
        self.looked.append(path.name)
        if path.name == "7.mp4":
            return ClipFault("broken")
        info = path.stat()
        return Probed(Hashed(info.st_size, info.st_mtime_ns, path.read_bytes().ljust(32, b"-")), Resolution(9, 64, 96))

    def find(
        self, part: str = "1/1", wanted=SOURCES, depend_on: str = ""
    ) -> tuple[dict[str, Probed | ClipFault], list[str]]:
        """What is found, and which clips were looked at for it."""
        index, count = map(int, part.split("/"))
        self.looked, advanced = [], []
        findings = SurveyCache(self.out, self.root, depend_on, Slice(index, count, ""))
        found = findings.find(set(wanted), SOURCES, self.probe, InlinePool(), lambda: advanced.append(1))
        assert len(advanced) == len(found) == len(wanted)
        return found, self.looked


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_cache, "_GROUP", 4)
    return Place(tmp_path)


def test_the_second_has_nothing_to_look_at_but_what_was_broken(place):
    first, looked = place.find("1/4")
    assert sorted(looked) == sorted(SOURCES)
    second, looked = place.find("3/4")
    assert second == first and looked == ["7.mp4"] and second["7.mp4"] == ClipFault("broken")


def test_every_worker_begins_with_other_clips(place):
    beginnings = []
    for worker in range(1, 5):
        for path in (place.out / SURVEY).glob("*"):
            path.unlink()
        beginnings.append(place.find(f"{worker}/4")[1][0])
    assert len(set(beginnings)) == 4


def test_what_another_has_found_out_meanwhile_is_not_looked_at_again(place, monkeypatch):
    """Groups are looked at some way ahead of the pool, so another worker may have come first since."""
    other, probed = Place.__new__(Place), place._probe
    other.__dict__ |= place.__dict__

    def probe_beside_another(path: Path) -> Probed | ClipFault:
        monkeypatch.undo()
        monkeypatch.setattr(probe_cache, "_GROUP", 4)
        other.find("2/2")
        return probed(path)

    monkeypatch.setattr(place, "_probe", probe_beside_another)
    found, looked = place.find("1/2")
    assert len(found) == len(SOURCES) and len(looked) <= 6, "the group at hand, and the clip that is broken"


def test_what_changed_is_looked_at_again(place):
    before, _ = place.find()
    (place.root / "3.mp4").write_bytes(b"another")
    after, looked = place.find()
    assert "3.mp4" in looked and len(looked) < len(SOURCES)
    assert after["3.mp4"] != before["3.mp4"] and after["4.mp4"] == before["4.mp4"]
    os.utime(place.root / "5.mp4", ns=(1, 1))
    assert "5.mp4" in place.find()[1]
    assert sorted(place.find(depend_on="--start 1")[1]) == sorted(SOURCES)


def test_part_of_a_group_is_added_to_what_was_known_of_it(place):
    place.find(wanted=SOURCES[:5])
    assert sorted(place.find(wanted=SOURCES[:10])[1]) == sorted(SOURCES[5:10])
    assert place.find(wanted=SOURCES[:10])[1] == ["7.mp4"]


def test_a_damaged_file_is_not_believed(place):
    place.find()
    for path in (place.out / SURVEY).iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert sorted(place.find()[1]) == sorted(SOURCES)


def test_a_folder_that_takes_nothing_costs_time_only(place):
    (place.out / SURVEY).write_bytes(b"a file where the folder should be")
    assert place.find() == place.find()


def never(*_args, **_named):
    raise AssertionError("a clip was looked at again")


def test_the_second_worker_of_an_encode_opens_no_clip_for_the_plan(encoded, settings_of, monkeypatch):
    out = encoded / "new"
    encode(settings_of(encoded, out=out, worker="1/2"))
    assert list((out / SURVEY).iterdir())
    monkeypatch.setattr(survey_module, "probe_clips", never)
    report = encode(settings_of(encoded, out=out, worker="2/2"))
    assert (report.rejected, report.unfinished) == (0, [])
    assert not (out / SURVEY).exists(), "all is committed; the records know the clips"
    same = [path.read_bytes() == (encoded / "out" / path.name).read_bytes() for path in sorted(out.glob("*.tar"))]
    assert same == [True] * 3
