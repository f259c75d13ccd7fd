"""Seconds from typed to the first step, the first clip, the prompt: what a command costs around its work.

``python -m workshop.bench_start FOLDER`` makes, once, in FOLDER: a checkpoint of 5B's true shape with random weights
(transformer, VAE, T5: 21 GB) and 1080p clips. Then it types, each in a process of its own:

* ``cogprep encode`` of the clips at 49x480x720, then again with nothing changed, and ``cogprep validate``;
* ``cogtrain plan`` for a named card, with and without the shards;
* ``cogtrain lora``, three steps, twice: the second finds the compiler's cache;

and prints a table: seconds to the first line, the first clip or step, the end, and from the last clip or step to the
end. ``--repo CHECKOUT --label before`` types the commands of another checkout, over the same model and clips;
``--beside CHECKOUT`` types ``encode`` and ``lora`` of that one and of this, turn about. All results lie in
FOLDER/start.jsonl, and every table has all of them. ``--imports`` adds what each library takes.

On an H200, before (an older commit) and after, both with files that are in memory, about eight minutes::

    mkdir -p build/before && git archive ce53e26 prep train common | tar -xC build/before
    python -m workshop.bench_start build/start --imports --twice --label after
    python -m workshop.bench_start build/start --repo build/before --label before

``--small`` takes the built-in model at 17x64x96, to try the script itself on two cores. Each part may take ``--limit``
seconds; one that fails leaves its last lines, and the rest goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

_PARTS = {"cogprep": "prep", "cogtrain": "train", "cogcommon": "common"}
_CLIP_BYTES = 16384  # in an unfinished shard: more than a header
_LIBRARIES = (
    "numpy", "pyarrow", "torch", "torch._dynamo", "diffusers", "transformers", "accelerate", "peft",
    "transformers:T5EncoderModel", "diffusers:AutoencoderKLCogVideoX", "diffusers:CogVideoXTransformer3DModel",
    "torch._inductor.compile_fx", "deepspeed",
)  # fmt: skip
_IMPORTS = """
import importlib, sys, time
for name in sys.argv[1:]:
    module, _, member = name.partition(":")
    started = time.perf_counter()
    try:
        found = importlib.import_module(module)
        if member:
            getattr(found, member)
    except Exception as error:
        print(f"  {name}: {error!r:.80}")
        continue
    print(f"  {time.perf_counter() - started:6.2f} s  {name}", flush=True)
import importlib.util, pathlib
torch = sys.modules.get("torch")
if torch and not pathlib.Path(importlib.util.cache_from_source(torch.__file__)).exists():
    print("  torch is compiled anew from its sources at each import: its folder keeps no .pyc files")
"""
_MARKS = ("memory ", "lora of ", "step 1/", "step 3/", "saved ", "wrote ", "next: ")  # what a run says, in this order


Row = dict[str, Any]


@dataclass
class Typed:
    """One command: its lines, and the seconds after typing at which each came."""

    code: int | None = None  # None: it took longer than allowed
    end_s: float = 0.0
    first_clip_s: float | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)

    def when(self, start: str, *, last: bool = False) -> float | None:
        """When the first line that begins so came, or the last."""
        times = [at for at, line in self.lines if line.startswith(start)]
        return times[-1 if last else 0] if times else None


def type_it(words: Sequence[str], environment: Mapping[str, str], limit: float, shards: Path | None = None) -> Typed:
    """Run a command, and look at its output and, it may be, at the shards that it writes."""
    typed = Typed()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *words], env=dict(environment), text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(limit, process.kill)
    timer.start()
    looking = threading.Thread(target=_look_for_a_clip, args=(shards, process, typed, started), daemon=True)
    if shards:
        looking.start()
    assert process.stdout is not None
    for line in process.stdout:
        typed.lines.append((time.perf_counter() - started, line.rstrip()))
    typed.code = process.wait()
    typed.end_s = time.perf_counter() - started
    if not timer.is_alive():
        typed.code = None
    timer.cancel()
    return typed


def _look_for_a_clip(shards: Path, process: subprocess.Popen[str], typed: Typed, started: float) -> None:
    while process.poll() is None and typed.first_clip_s is None:
        sizes = []
        for file in [*shards.glob(".*.tar.tmp"), *shards.glob("*.tar")]:
            try:
                sizes.append(file.stat().st_size)
            except OSError:
                continue  # it has just got its name
        if sizes and max(sizes) > _CLIP_BYTES:
            typed.first_clip_s = time.perf_counter() - started
        time.sleep(0.02)


def make_model(folder: Path) -> None:
    """A diffusers folder of 5B: random weights of the true shapes, transformer, VAE and T5."""
    import torch

    from workshop.bench_encode.make import make_checkpoint
    from workshop.bench_encode.shape import SHAPES
    from workshop.bench_train.subject import random_checkpoint

    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    make_checkpoint(scratch, SHAPES["true"], text_layers=24)
    shutil.rmtree(scratch / "transformer")
    transformer = random_checkpoint("5b").load_transformer(torch.bfloat16)
    for parameter in transformer.parameters():  # windows of one memory, which safetensors would store once
        parameter.data = parameter.data.clone()
    transformer.save_pretrained(scratch / "transformer", max_shard_size="5GB")
    scratch.rename(folder)


def make_clips(folder: Path, count: int) -> None:
    from workshop.bench_encode.make import make_data_set
    from workshop.bench_encode.shape import SHAPES

    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    make_data_set(scratch, SHAPES["true"], count)
    scratch.rename(folder)


def environment_of(repo: Path, folder: Path, label: str) -> dict[str, str]:
    """An environment whose ``python -m cogtrain`` is a checkout's; the programs' own cache is one of this label's."""
    names = folder / f"names-{label}"
    names.mkdir(exist_ok=True)
    for package, part in _PARTS.items():
        link = names / package
        if not link.is_symlink():
            link.symlink_to((repo / part).resolve())
    more = {"PYTHONPATH": str(names.resolve()), "COGTUNE_CACHE": str((folder / f"cache-{label}").resolve())}
    return {**os.environ, **more}


@dataclass(frozen=True)
class Typist:
    """Types a checkout's commands; a row of the table each."""

    folder: Path
    label: str
    env: Mapping[str, str]
    small: bool
    limit: float

    def all(self, *, twice: bool) -> Iterator[Row]:
        """Every command, one after the other."""
        out, card = self.folder / f"shards-{self.label}", "H200"
        encode, look = self._over_clips("encode", out), self._over_clips("validate", out)
        yield self.encode(out)
        yield self._type("encode, nothing changed", encode)
        if twice:
            yield self.encode(out.with_name(out.name + "-again"), "encode, weights known")
        yield self._type("validate", look)
        yield self._type("plan", ["cogtrain", "plan", "--model", "THUDM/CogVideoX-5b", "--gpu", card])
        if tars := sorted(map(str, out.glob("*.tar"))):
            yield self._type("plan of shards", ["cogtrain", "plan", "--gpu", card, "--shards", *tars])
            yield self.lora(out)
            yield self.lora(out, "lora, 3 steps, again")

    def encode(self, out: Path, name: str = "encode") -> Row:
        shutil.rmtree(out, ignore_errors=True)
        return self._type(name, self._over_clips("encode", out), out)

    def lora(self, shards: Path, name: str = "lora, 3 steps") -> Row:
        run, tars = self.folder / f"run-{self.label}", sorted(map(str, shards.glob("*.tar")))
        shutil.rmtree(run, ignore_errors=True)
        words = ["cogtrain", "lora", "--steps", "3", "--memory", "fast", "--out", str(run), "--shards", *tars]
        return self._type(name, words)

    def _over_clips(self, command: str, out: Path) -> list[str]:
        size, model = ("17x64x96", "tiny") if self.small else ("49x480x720", str(self.folder / "model"))
        words = ["cogprep", command, "--data-root", str(self.folder / "clips"), "--model", model]
        return [*words, "--resolution", size, "--out", str(out)]

    def _type(self, name: str, words: Sequence[str], shards: Path | None = None) -> Row:
        typed = type_it(words, self.env, self.limit, shards)
        first = typed.first_clip_s or typed.when("step 1/")
        last = typed.when("step 3/") or typed.when("encoding: ", last=True)
        _log(self.folder, f"{self.label}: {name}", typed)
        return {
            "label": self.label, "command": name, "first_line_s": typed.when("lora of "), "first_s": first,
            "end_s": typed.end_s, "after_s": typed.end_s - last if last else None, "code": typed.code,
            "lines": typed.lines,
        }  # fmt: skip


def in_turn(typists: Sequence[Typist], turns: int) -> Iterator[Row]:
    """``encode`` and ``lora`` of each, turn about; the first turn finds nothing of what later ones have kept."""
    for turn in range(turns + 1):
        name = f"turn {turn}" if turn else "first time"
        for typist in typists:
            yield typist.encode(typist.folder / f"shards-{typist.label}", f"encode, {name}")
        for typist in typists:
            yield typist.lora(typist.folder / f"shards-{typist.label}", f"lora, 3 steps, {name}")


def _log(folder: Path, title: str, typed: Typed) -> None:
    with (folder / "start.log").open("a", encoding="utf-8") as log:
        log.write(f"\n== {title}: code {typed.code}, {typed.end_s:.2f} s\n")
        log.writelines(f"{at:7.2f}  {line}\n" for at, line in typed.lines)
    marks = [f"{mark.strip()} {at:.1f}" for mark in _MARKS if (at := typed.when(mark)) is not None]
    print(
        f"{title}: {typed.end_s:.1f} s"
        + (f" ({', '.join(marks)})" if len(marks) > 1 else "")
        + ("" if typed.code == 0 else f", code {typed.code}"),
        flush=True,
    )
    if typed.code != 0:
        print(*(f"    {at:7.2f}  {line}" for at, line in typed.lines[-12:]), sep="\n", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what the newest rows of each label found; seconds."""
    newest = {(row["command"], row["label"]): row for row in rows}
    lines = ["| command | checkout | its first line | first step or clip | after the last one | in all |"]
    lines.append("|---|---|---|---|---|---|")
    commands, labels = (list(dict.fromkeys(row[name] for row in rows)) for name in ("command", "label"))
    for command in commands:
        for label in labels:
            if row := newest.get((command, label)):
                cells = [row[name] for name in ("first_line_s", "first_s", "after_s", "end_s")]
                shown = ["" if cell is None else f"{cell:.1f}" for cell in cells]
                failed = "" if row["code"] == 0 else " (failed)"
                lines.append(f"| {command} | {label}{failed} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model, the clips and the results lie.")],
    repo: Annotated[Path, typer.Option(help="The checkout whose commands are typed.")] = Path(__file__).parents[1],
    label: Annotated[str, typer.Option(help="What the table calls it.")] = "here",
    clips: Annotated[int, typer.Option(min=1, help="How many files; each is in the lists twice.")] = 4,
    limit: Annotated[float, typer.Option(help="Seconds that one command may take.")] = 150.0,
    small: Annotated[bool, typer.Option("--small", help="The built-in model, for a CPU.")] = False,
    twice: Annotated[
        bool, typer.Option("--twice", help="Encode once more, elsewhere: weights are known then.")
    ] = False,
    beside: Annotated[
        Path | None, typer.Option(help="Another checkout: only `encode` and `lora` of both, turn about.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="With --beside: how often, after a first time.")] = 2,
    imports: Annotated[bool, typer.Option("--imports", help="Say what importing each library takes.")] = False,
) -> None:
    """Seconds from typed to the first step, the first clip, the prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not (folder / "clips").exists():
        if small:
            from workshop.draw import write_data_set

            write_data_set(folder / "clips", clips, seed=0)
        else:
            make_clips(folder / "clips", clips)
    if not small and not (folder / "model").exists():
        make_model(folder / "model")
    print(f"model and clips: {time.perf_counter() - began:.0f} s", flush=True)
    env = environment_of(repo, folder, label)
    if imports:
        print("imports, one after the other in one process:", flush=True)
        for _ in range(2):  # the first reads the files from the disk
            print(subprocess.run([sys.executable, "-c", _IMPORTS, *_LIBRARIES], env=env, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout, flush=True)  # fmt: skip
    here = Typist(folder, label, env, small, limit)
    rows = here.all(twice=twice)
    if beside:
        rows = in_turn([Typist(folder, "beside", environment_of(beside, folder, "beside"), small, limit), here], turns)
    with (folder / "start.jsonl").open("a", encoding="utf-8") as results:
        for row in rows:
            results.write(json.dumps(row) + "\n")
    print("\n" + table([json.loads(line) for line in (folder / "start.jsonl").read_text().splitlines()]))
    print(f"\n{time.perf_counter() - began:.0f} s in all; every line with its second: {folder / 'start.log'}")


if __name__ == "__main__":
    typer.run(main)
