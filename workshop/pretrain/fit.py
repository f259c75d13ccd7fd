"""One training loop for every part of the built-in model: resumable, seeded by step, and in time if told so."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .muon import Muon

Inputs = tuple[torch.Tensor, ...]
Losses = dict[str, torch.Tensor]

_EAGER = 3  # steps of a shape before its graph is captured: libraries choose and allocate in them


def fit(
    model: torch.nn.Module,
    inputs_at: Callable[[int, float], Inputs],
    losses_of: Callable[..., Losses],
    folder: Path,
    *,
    lr: float,
    steps: int | None = None,
    minutes: float | None = None,
    until: float | None = None,
    calls: float = 1.0,
    decay: float = 0.0,
    graphs: bool = False,
    save_seconds: float = 30,
) -> tuple[int, float]:
    """Train with Muon and a one-cycle learning rate; continue where ``folder`` was left.

    The model is left with the average of its weights over the last part of the
    run, about a tenth of it.

    Args:
        inputs_at: the inputs of a step, on the model's device, from the step's number and the progress
            (0..1) alone, so that a resumed run of ``steps`` is the run.
        losses_of: the losses of these inputs by name; their sum gives the gradient.
        folder: gets ``state.pt`` and ``metrics.jsonl``.
        steps: in all; the learning rate falls to zero there.
        minutes: in all, those before a resume counted in; it falls to zero there, if that is sooner.
        until: a moment (`time.time`) at which to stop and save. Unless ``steps`` or ``minutes`` say how long the
            run is, it ends after ``calls`` stretches as long as from now to there, this one counted in.
        decay: of the weights (`Muon`).
        lr: peak, reached after a twentieth of the run, or 100 steps.
        graphs: capture each shape's step as a CUDA graph. A step here is thousands of small kernels;
            starting them one by one takes longer than they do.

    Returns:
        The steps and the seconds taken in all.
    """
    if steps is None and minutes is None and until is None:
        raise ValueError("say how long: steps, minutes or until when")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, losses_of, graphs, decay)
    state_file, step, before = folder / "state.pt", 0, 0.0
    if state_file.exists():
        saved = torch.load(state_file, map_location="cpu", weights_only=True)
        run.load(saved)
        step, before = saved["step"], saved["seconds"]
    if until is not None and steps is None and minutes is None:
        minutes = (before + calls * max(0.0, until - time.time())) / 60
    started = saved_at = time.monotonic()
    seen: list[torch.Tensor] = []  # losses since the last line
    ended = False
    while not ended:
        seconds = before + time.monotonic() - started
        progress = max(step / steps if steps else 0.0, seconds / (60 * minutes) if minutes else 0.0)
        if progress >= 1 or (until is not None and time.time() >= until):
            break
        run.optimizer.rate.fill_(lr * one_cycle(step, progress))
        run.blend.fill_(10 / (step + 10))
        seen.append(run(inputs_at(step, progress)))
        step += 1
        if step % 10 == 0 and seen[-1].is_cuda:
            torch.cuda.synchronize()  # or the clock above runs ahead of the GPU
        ended = step == steps
        late = time.monotonic() - saved_at > save_seconds
        if step % 100 == 0 or ended or late:
            means = dict(zip(run.names, torch.stack(seen).mean(0).tolist(), strict=True))
            if not math.isfinite(sum(means.values())):
                raise FloatingPointError(f"the losses near step {step} are not finite: {means}")
            seen.clear()
            seconds = before + time.monotonic() - started
            line = {"step": step, **means, "seconds": seconds}
            rounded = json.dumps({name: float(f"{value:.4g}") for name, value in line.items()})
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
                out.write(rounded + "\n")
            print(rounded, flush=True)
            if late:
                _save(run, folder, step, seconds)
                saved_at = time.monotonic()
    seconds = before + time.monotonic() - started
    _save(run, folder, step, seconds)
    run.take_average()
    return step, seconds


def one_cycle(step: int, progress: float) -> float:
    """Up in a straight line over 100 steps or a twentieth of the run, then down along half a cosine."""
    rise = min(1.0, max((step + 1) / 100, 20 * progress))
    return rise * (0.5 + 0.5 * math.cos(math.pi * progress))


def name_of(device: torch.device) -> str:
    """Of the machine's part that trained, for a card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _save(run: _Run, folder: Path, step: int, seconds: float) -> None:
    torch.save({**run.state(), "step": step, "seconds": seconds}, folder / ".state.tmp")
    (folder / ".state.tmp").rename(folder / "state.pt")


class _Run:
    """A model with its optimizer and the average of its weights; a call takes one step and gives the losses."""

    def __init__(self, model: torch.nn.Module, losses_of: Callable[..., Losses], graphs: bool, decay: float) -> None:
        self.model, self.losses_of, self.graphs = model, losses_of, graphs
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.optimizer = Muon(model.parameters(), decay)
        self.average = [p.detach().clone() for p in self.parameters]
        self.blend = torch.ones((), device=self.parameters[0].device)  # share of the average that a step replaces
        self.names: list[str] = []
        self._met: dict[tuple[torch.Size, ...], int] = {}
        self._captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor]] = {}

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        if not (self.graphs and inputs[0].is_cuda):
            return self._step(inputs)
        key = tuple(tensor.shape for tensor in inputs)
        self._met[key] = self._met.get(key, 0) + 1
        if self._met[key] <= _EAGER:
            # As torch asks for before a capture: on a stream of its own.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                losses = self._step(inputs)
            torch.cuda.current_stream().wait_stream(side)
            return losses
        if key not in self._captured:
            self._captured.clear()  # and its memory: a run goes from one shape to the next, never back
            try:
                self._captured[key] = self._capture(inputs)
            except RuntimeError as error:  # slower, but it trains
                print(f"no CUDA graph, step by step instead: {error}", flush=True)
                self.graphs = False
                return self._step(inputs)
        graph, own, losses = self._captured[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return losses.clone()

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, torch.Tensor]:
        """One step as a graph, not yet run; its own inputs, and the losses that it will leave."""
        own, graph = tuple(tensor.clone() for tensor in inputs), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            losses = self._step(own)
        return graph, own, losses

    def _step(self, inputs: Inputs) -> torch.Tensor:
        self.optimizer.clear()
        losses = self.losses_of(*inputs)
        self.names = list(losses)
        stacked = torch.stack(list(losses.values()))
        stacked.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            news = torch._foreach_sub(self.parameters, self.average)
            torch._foreach_mul_(news, self.blend)
            torch._foreach_add_(self.average, news)
        return stacked.detach()

    @torch.no_grad()
    def take_average(self) -> None:
        for mean, p in zip(self.average, self.parameters, strict=True):
            p.copy_(mean)

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "average": self.average, "optimizer": self.optimizer.state()}

    @torch.no_grad()
    def load(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.optimizer.load(state["optimizer"])  # type: ignore[arg-type]
        for mine, saved in zip(self.average, state["average"], strict=True):  # type: ignore[call-overload]
            mine.copy_(saved)
