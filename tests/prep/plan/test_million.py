"""What planning costs for a clip does not grow with the number of clips: no step is quadratic, in time or in memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from in_process import InlinePool

from cogprep.plan import origin as origins
from cogprep.plan.origin import Origin
from cogprep.plan.plan import EncodePlan
from workshop.million import STAGES, Trial, cache_of, commit, lay, main, nothing, planned, pretend, train

FEW, MANY = 2_000, 8_000


def laid(path: Path, clips: int) -> Trial:
    """A data set whose clips are probed, and nothing more."""
    trial = Trial(path / str(clips), clips, 50)
    (trial.folder / "ds").mkdir(parents=True)
    lay(trial)
    settings, checkpoint, _ = trial.opened()
    settings.out.mkdir()
    sources = dict.fromkeys(sample.source for sample in settings.read_lists("t2v").trusted().samples)
    cache_of(settings, checkpoint).find(sources.keys(), sources, pretend, InlinePool(), nothing)
    return trial


def cpu_s(call) -> float:
    """Seconds of CPU, the least of three times: now and then the collector looks at all that other tests have left."""
    spent = []
    for _ in range(3):
        begun = time.process_time()
        call()
        spent.append(time.process_time() - begun)
    return min(spent)


def test_four_times_the_clips_take_four_times_as_long(tmp_path):
    spent: dict[str, list[float]] = {"plan": [], "plan again": [], "train": []}
    plans: list[EncodePlan] = []
    for clips in (FEW, MANY):
        trial = laid(tmp_path, clips)
        if clips == FEW:
            planned(trial)  # imports
        spent["plan"].append(cpu_s(lambda trial=trial: planned(trial)))
        commit(trial, every=1)
        spent["plan again"].append(cpu_s(lambda trial=trial: plans.append(planned(trial)[0])))
        spent["train"].append(cpu_s(lambda trial=trial: train(trial)))
        assert (plans[-1].reused, plans[-1].new, plans[-1].dropped) == (clips, 0, 0)
    for stage, (few, many) in spent.items():
        assert many < 8 * few, f"{stage}: {few:.2f} s of {FEW} clips, {many:.2f} s of {MANY}; 16 times were quadratic"


def test_a_clip_takes_no_more_than_so_much_memory(tmp_path):
    trial = laid(tmp_path, FEW)
    planned(trial)  # imports, and what is remembered for good
    tracemalloc.start()
    try:
        plan, _ = planned(trial)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.new == FEW and peak / FEW < 4_000, "bytes a clip, captions of 300 among them"


def test_the_lists_are_read_once_however_many_samples_go(tmp_path, monkeypatch):
    """Before a sample goes, the lists are looked at again: of a million, 400 MB each time."""
    lists = {name: tmp_path / name for name in ("prompts.txt", "videos.txt")}
    for path in lists.values():
        path.write_text("one\n")
    origin = Origin(str(tmp_path), "prompts.txt", "videos.txt", None, "")
    just_written = origin.state_of_lists()
    reads: list[Path] = []
    hash_of_list = origins.hash_of_list
    monkeypatch.setattr(origins, "hash_of_list", lambda path: (reads.append(path), hash_of_list(path))[1])
    monkeypatch.setattr(origins, "_SETTLED_NS", -(1 << 62))
    assert {origin.state_of_lists() for _ in range(100)} == {just_written} and len(reads) <= 2
    lists["prompts.txt"].write_text("two\n")
    assert origin.state_of_lists() != just_written
    monkeypatch.setattr(origins, "_SETTLED_NS", 1 << 62)  # of a list written just now, time and size say little
    reads.clear()
    assert origin.state_of_lists() == origin.state_of_lists() and len(reads) == 4


@pytest.mark.full
def test_a_million(tmp_path):
    """About 15 minutes on two cores, a million inodes and 1 GB of disk."""
    main(tmp_path / "million", 1_000_000, 50)
    results = {row["stage"]: row for row in map(json.loads, (tmp_path / "million/results.jsonl").open())}
    assert results.keys() == STAGES.keys()
    for stage in ("plan, from the survey cache", "plan, half committed", "plan, all committed", "plan, 2% changed"):
        assert results[stage]["cpu_s"] < 120 and results[stage]["peak_mib"] < 3 << 10, results[stage]
    assert results["train"]["cpu_s"] < 120 and results["train"]["peak_mib"] < 3 << 10, results["train"]
