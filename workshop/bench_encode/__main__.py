"""How fast this machine encodes 49x480x720, beside what CogVideo's guide runs.

``python -m workshop.bench_encode FOLDER`` makes a checkpoint of true shapes and random weights
and 1080p clips in FOLDER (11 GB), then measures on this machine's first GPU

* the VAE's encoder, one lever at a time, with the distance of its latents from fp32;
* one ``cogprep encode``: clips a minute, and the share of time that the GPU was busy;
* a plain serial loop over the same clips: decode, tiled VAE, T5.

With ``--ways`` it measures the fused encoder with none of its ways and all, and other launches of its steps, then an
encode with all and one with none (``--ways --seconds 240``).

Every part is a process of its own; one that fails or takes too long leaves its last
line and the rest goes on. Results: FOLDER/results.jsonl, FOLDER/table.md, FOLDER/log.txt.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from .shape import SHAPES, Folder, Size
from .table import table

_LEVERS = (
    "exact",
    "diffusers, tiled",
    "diffusers, whole frames",
    "diffusers, cudnn.benchmark",
    "fused",
    "fused, cudnn.benchmark",
)
# Slow to begin, or known to be slow: measured when the rest is done.
_MORE_LEVERS = (
    "diffusers, compiled, channels_last_3d, cudnn.benchmark",
    "fused, cudnn.benchmark of every kernel",
    "diffusers, channels_last_3d",
)
_AT_ONCE = 4  # levers that load at the same time; the GPU measures one after the other


@dataclass
class Bench:
    """Runs parts, and keeps what they print."""

    folder: Folder
    deadline: float
    log: IO[str]
    results: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def start(self, module: str, *words: object) -> Part:
        command = [sys.executable, "-m", module, *map(str, words)]
        output = (self.folder.root / f"part-{time.monotonic_ns()}.txt").open("w+")
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        return Part(" ".join(command[2:]), child, output, time.monotonic())

    def finish(self, part: Part, limit_s: float) -> bool:
        """Wait for a part and take its JSON lines; gives whether it ended well."""
        left_s = min(limit_s, self.deadline - time.monotonic())
        try:
            code = part.child.wait(max(1.0, left_s))
        except subprocess.TimeoutExpired:
            part.child.kill()
            part.child.wait()
            code = 124
        part.output.seek(0)
        lines = part.output.read().splitlines()
        part.output.close()
        Path(part.output.name).unlink()
        for line in lines:
            if line.startswith("{"):
                self.add(json.loads(line))
        seconds = time.monotonic() - part.started
        self.log.write(f"===== {part.name}: {code} in {seconds:.1f} s\n" + "\n".join(lines) + "\n")
        last = "" if code == 0 else "; " + (lines[-1] if lines else "no output")[:300]
        self.say(f"{part.name}: {'done' if code == 0 else f'failed ({code})'} in {seconds:.1f} s{last}")
        return code == 0

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        with (self.folder.root / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

    def say(self, line: str) -> None:
        line = f"[{time.monotonic() - self.started:5.0f} s] {line}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


@dataclass
class Part:
    name: str
    child: subprocess.Popen[bytes]
    output: IO[str]
    started: float


def make(bench: Bench, size: Size, clips: int, text_layers: int) -> bool:
    """The checkpoint and the clips, at the same time."""
    root = bench.folder.root
    model = bench.start("workshop.bench_encode.make", "model", root, size, text_layers)
    drawn = bench.start("workshop.bench_encode.make", "clips", root, size, clips)
    bench.add(machine())  # takes seconds to import, so here
    return all([bench.finish(model, 120), bench.finish(drawn, 120)])


def levers(bench: Bench, size: Size, names: Sequence[str]) -> None:
    """Measure levers in turn; the next ones load meanwhile."""
    waiting = list(names)
    running: list[Part] = []
    while waiting or running:
        while waiting and len(running) < _AT_ONCE:
            running.append(bench.start("workshop.bench_encode.vae", bench.folder.root, size, waiting.pop(0)))
        bench.finish(running.pop(0), 90)


def more_of_the_vae(bench: Bench, size: Size) -> None:
    """What is measured of the VAE where time is left: 1.5's native size, and the slow levers."""
    if size == "true" and bench.left_s > 20:
        bench.finish(bench.start("workshop.bench_encode.vae", bench.folder.root, "large", "fused, cudnn.benchmark"), 90)
    for lever in _MORE_LEVERS:
        if bench.left_s > 15:
            levers(bench, size, [lever])


def encode(bench: Bench, size: Size, ways: Mapping[str, Any] | None = None) -> None:
    """`cogprep encode`, as a user runs it, or with other ways of the VAE's encoder (`stage`)."""
    out = bench.folder.shards / str(len(bench.results))
    module, first = ("cogprep", []) if ways is None else ("workshop.bench_encode.stage", [json.dumps(ways)])
    words = ["--data-root", bench.folder.clips, "--model", bench.folder.model, "--out", out]
    part = bench.start(module, *first, "encode", *words, "--resolution", SHAPES[size].resolution)
    if bench.finish(part, 120):
        name = "" if ways is None else json.dumps(ways)
        bench.add({"encode": json.loads((out / "report.json").read_bytes()), "ways": name})


def every_way(bench: Bench, size: Size) -> None:
    """The fused encoder's ways by themselves, then a whole encode with all of them, and one with none."""
    budget = max(30.0, bench.left_s - 110)
    bench.finish(bench.start("workshop.bench_encode.ways", bench.folder.root, size, budget), budget + 40)
    everything = {"together": True, "bias_later": True, "first_kernel": True, "kernels": {"backwards": True}}
    for ways in (everything, {}):
        if bench.left_s > 30:
            encode(bench, size, ways)


def main(
    folder: Annotated[Path, typer.Argument(help="An empty folder for 11 GB.")],
    seconds: Annotated[float, typer.Option(help="When to stop.")] = 600,
    clips: Annotated[int, typer.Option(min=4, help="Clips to draw; each is encoded under two captions.")] = 48,
    text_layers: Annotated[int, typer.Option(min=1, help="Layers of T5; the true one has 24.")] = 24,
    serial: Annotated[int, typer.Option(min=1, help="Clips of the serial loop.")] = 6,
    size: Annotated[str, typer.Option(help="true, or tiny to try the benchmark on a CPU.")] = "true",
    vae: Annotated[bool, typer.Option(help="The VAE alone, one lever at a time, too.")] = True,
    ways: Annotated[bool, typer.Option(help="Only the fused encoder's ways, and encodes with all and none.")] = False,
) -> None:
    """Measure how fast this machine encodes."""
    chosen: Size = "tiny" if size == "tiny" else "true"
    where = Folder(folder.resolve())
    where.root.mkdir(parents=True, exist_ok=True)
    if any(where.root.iterdir()):
        raise typer.BadParameter(f"{where.root} is not empty")
    with (where.root / "log.txt").open("w", encoding="utf-8") as log:
        bench = Bench(where, time.monotonic() + seconds, log)
        made = make(bench, chosen, clips, text_layers)
        if made and ways:
            every_way(bench, chosen)
        elif made:
            if vae:
                levers(bench, chosen, _LEVERS)
            encode(bench, chosen)
            bench.finish(bench.start("workshop.bench_encode.pipeline", where.root, chosen, serial), 90)
            if vae:
                more_of_the_vae(bench, chosen)
        text = table(bench.results)
        (where.root / "table.md").write_text(text, encoding="utf-8")
    for path in (where.model, where.clips, where.shards):
        shutil.rmtree(path, ignore_errors=True)
    print(text)


def machine() -> dict[str, Any]:
    """What was measured on."""
    import diffusers
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    command = "python -m workshop.bench_encode " + " ".join(sys.argv[1:])
    return {"machine": gpu, "versions": versions, "command": command}


if __name__ == "__main__":
    typer.run(main)
