"""What planning costs, in a process that holds nothing else: no thread and no memory of another test is counted.

``python plan_costs.py FOLDER FEW MANY`` prints one JSON object: of each stage the seconds of CPU, and the most bytes
that Python objects took to plan, each with few clips and with many.
"""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from in_process import InlinePool

from workshop.million import Trial, cache_of, commit, lay, nothing, planned, pretend, train


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


def cpu_s(call: Callable[[], object]) -> float:
    """Seconds of CPU, the least of three times."""
    spent = []
    for _ in range(3):
        begun = time.process_time()
        call()
        spent.append(time.process_time() - begun)
    return min(spent)


def peak(trial: Trial) -> int:
    """Bytes that Python objects take at most while the shards are planned."""
    planned(trial)  # imports, and what is remembered for good
    tracemalloc.start()
    made, _ = planned(trial)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.new == trial.clips
    return held


def main(folder: Path, *sizes: int) -> None:
    """Print the costs of data sets of these sizes."""
    stages: dict[str, list[float]] = {"plan": [], "plan again": [], "train": []}
    peaks: list[int] = []
    for clips in sizes:
        trial = laid(folder, clips)
        peaks.append(peak(trial))
        stages["plan"].append(cpu_s(lambda trial=trial: planned(trial)))
        commit(trial, every=1)
        stages["plan again"].append(cpu_s(lambda trial=trial: planned(trial)))
        again, _ = planned(trial)
        assert (again.reused, again.new, again.dropped) == (clips, 0, 0)
        stages["train"].append(cpu_s(lambda trial=trial: train(trial)))
    print(json.dumps({"cpu_s": stages, "peak_bytes": peaks}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
