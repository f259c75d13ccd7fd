"""Validation: loss and videos of held-out samples, and videos of prompts, with the base model's beside them.

Every number is a function of the samples and the weights alone. Each sample is
measured once, by one rank, as a batch of one, so the value does not depend on
the number of processes; nothing here uses a random generator of training's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.progress import stage
from cogcommon.files.atomic import commit_bytes
from cogcommon.words import counted

from ..data.batches import Collator, StoredSample, read_sample
from ..data.sampler import Slot
from ..data.shard_set import ShardSet
from ..distributed.signals import StopRequest
from ..distributed.strategy import Runtime
from ..model.objective import Objective
from ..runs.folder import CAPTIONS_FILE, PROMPTS_FILE, VALIDATION, ValidationLine, drawn_prompts, finite
from ..runs.log import RunLog, peak_gib, reset_peak
from ..runs.run import Run
from .drawing import HELD_OUT_SEED, Asked, Drawing, Scene, Video, of_prompt, of_sample
from .embed import EmbeddedPrompt

if TYPE_CHECKING:
    import torch

TIMESTEPS = (125, 375, 625, 875)  # the middles of four equal parts
_BASE_FILE = "base.json"


@dataclass(frozen=True)
class Validation:
    """Measures a model on held-out samples, and draws videos of their captions and of a person's prompts.

    Args:
        drawing: whose objective is without any weighting of the loss, and whose stop is asked between samples, too.
        base_loss: of the untouched base model; NaN without held-out samples, None until it is measured (`begin`).
    """

    run: Run
    runtime: Runtime
    held_out: ShardSet | None
    prompts: Sequence[EmbeddedPrompt]
    drawing: Drawing
    log: RunLog
    base_loss: float | None

    @classmethod
    def of(
        cls, run: Run, runtime: Runtime, folder: Path, log: RunLog, stop: StopRequest,
        prompts: Sequence[EmbeddedPrompt] = (),
    ) -> Validation | None:  # fmt: skip
        """What a run validates, before its model is there; None where it has nothing to validate. Every rank calls it.

        Args:
            prompts: the run's (`embed_prompts`).
        """
        if run.held_out is None and not prompts:
            return None
        drawing = Drawing(run, runtime, Objective.of(run.checkpoint), folder / VALIDATION, stop)
        validation = cls(run, runtime, run.held_out, prompts, drawing, log, math.nan)
        return dataclasses.replace(validation, base_loss=validation._remembered()) if run.held_out else validation

    @property
    def begun(self) -> bool:
        """Whether the base model has been measured, and has drawn each prompt; every rank asks."""
        return self.base_loss is not None and not self._undrawn(0)

    def begin(self, model: torch.nn.Module) -> Validation:
        """Measure the base model, unless this run has done so before.

        Call it when nothing has been trained or resumed yet: LoRA's B is zero
        (`Method.as_base`) and full fine-tuning's weights are the checkpoint's, so
        ``model`` is the base model. Every rank calls it.

        Raises:
            ShardError: a held-out sample is damaged.
        """
        run, runtime, log, drawing, known = self.run, self.runtime, self.log, self.drawing, self.base_loss
        undrawn = self._undrawn(0)
        if known is None or undrawn:
            log.say(f"validation: {self._described()}; base model first")
            if self.draws and not runtime.whole:
                log.say(
                    f"validation videos: {run.strategy} gathers the weights once, into host memory of each process "
                    "that draws; if that is too much, leave --validate-videos and --validate-prompt out"
                )
            with run.method.as_base(model):
                found, peak = self._take(model, 0, measured=known is None, prompts=undrawn)
            if runtime.device.type == "cuda":
                log.say(f"validation held at most {peak:.1f} GiB of the GPU")
            if known is None:
                known = found
                self._remember(known)
        if self.prompts and runtime.main:  # of those of before there are videos
            now = {one.prompt.name: one.prompt.text for one in self.prompts}
            before = drawn_prompts(drawing.folder.parent)
            listed = json.dumps(now | {n: p for n, p in before.items() if n not in now}, indent=1)
            commit_bytes(drawing.folder / PROMPTS_FILE, listed.encode())
        return dataclasses.replace(self, base_loss=known)

    def _described(self) -> str:
        held_out, prompts = len(self.held_out or ()), len(self.prompts)
        samples = f"{counted(held_out, 'held-out sample')} at {len(TIMESTEPS)} timesteps"
        return " and ".join([samples] * bool(held_out) + [counted(prompts, "prompt")] * bool(prompts))

    def _remembered(self) -> float | None:
        """The base model's loss as rank 0 finds it in the run folder."""
        found = ""
        path = self.drawing.folder / _BASE_FILE
        if self.runtime.main and path.exists():
            found = path.read_text(encoding="utf-8")
        known = json.loads(self.runtime.peers.broadcast(found) or "{}")
        if known.get("facts") != self._facts():
            return None
        return math.nan if known["loss"] is None else float(known["loss"])

    def _remember(self, loss: float) -> None:
        if self.runtime.main:
            self.drawing.folder.mkdir(parents=True, exist_ok=True)
            known = {"facts": self._facts(), "loss": finite(loss)}
            commit_bytes(self.drawing.folder / _BASE_FILE, json.dumps(known).encode())

    def _facts(self) -> list[Any]:
        """What the base model's loss and videos of held-out samples depend on."""
        assert self.held_out
        return [
            self.held_out.fingerprint,
            self.run.checkpoint.fingerprint,
            self.run.precision,
            [*TIMESTEPS],
            self.videos,
        ]

    def _undrawn(self, step: int) -> list[EmbeddedPrompt]:
        """Prompts of which rank 0 finds no video of a step; a name stands for all that the base model's depends on."""
        folder = self.drawing.folder_of(step)
        there = self.runtime.peers.broadcast([(folder / f"{one.prompt.name}.mp4").is_file() for one in self.prompts])
        return [one for one, drawn in zip(self.prompts, there, strict=True) if not drawn]

    @property
    def videos(self) -> int:
        """Of held-out samples."""
        return min(self.run.settings.validate_videos, len(self.held_out)) if self.held_out else 0

    @property
    def draws(self) -> bool:
        return bool(self.videos or self.prompts)

    def due(self, step: int) -> bool:
        """Whether a step is to be validated."""
        return step > 0 and (step == self.run.steps or step % self.run.settings.validate_every == 0)

    def lacks(self, step: int, lines: Sequence[ValidationLine]) -> bool:
        """Whether something of a step's validation is not there; every rank calls it.

        A signal has come first, or meanwhile, or a prompt is new.

        Args:
            lines: of the validations so far.
        """
        if not self.due(step):
            return False
        return not self.begun or self._unmeasured(step, lines) or bool(self._undrawn(step))

    def _unmeasured(self, step: int, lines: Sequence[ValidationLine]) -> bool:
        return bool(self.held_out) and all(line.step != step for line in lines)

    def measure(
        self, model: torch.nn.Module, step: int, lines: Sequence[ValidationLine]
    ) -> ValidationLine | None:  # fmt: skip
        """Loss, and videos where asked for; every rank calls it.

        Args:
            lines: of the validations so far: one of this step is not made again.

        Returns:
            None if the run is asked to stop meanwhile, or where no held-out samples were measured.
        """
        training = peak_gib(self.runtime.device)  # since the last validation
        measured = self._unmeasured(step, lines)
        try:
            value, peak = self._take(model, step, measured=measured, prompts=self.prompts)
        except Asked:
            return None
        if self.runtime.device.type == "cuda" and peak > training:
            self.log.say(
                f"validation held {peak:.1f} GiB of the GPU, training {training:.1f}"
                + ("; without videos it holds less" if self.draws else "")
            )
        if not measured:
            return None
        assert self.base_loss is not None
        return ValidationLine(step, finite(value), finite(self.base_loss), peak)

    def _take(
        self, model: torch.nn.Module, step: int, *, measured: bool, prompts: Sequence[EmbeddedPrompt]
    ) -> tuple[float, float]:  # fmt: skip
        """The loss, and the most memory held meanwhile; before and after it is counted anew.

        Args:
            measured: the held-out samples are, and drawn.
            prompts: that are drawn.
        """
        reset_peak(self.runtime.device)
        value = self.loss(model) if measured else math.nan
        self.draw(model, step, self.videos if measured else 0, prompts)
        peak = peak_gib(self.runtime.device)
        reset_peak(self.runtime.device)
        return value, peak

    def draw(self, model: torch.nn.Module, step: int, held_out: int, prompts: Sequence[EmbeddedPrompt]) -> None:
        """Write the videos of the first held-out samples, ``step-N/i.mp4``, and of prompts, ``step-N/NAME.mp4``."""
        import safetensors.torch

        if not held_out and not prompts:
            return
        objective, samples = self.drawing.objective, self.held_out
        # Encode writes no empty caption beside held-out shards.
        empty_BLD = safetensors.torch.load(self.run.shards.empty_caption())["text"][None]

        def of_held_out(index: int) -> Scene:
            assert samples
            return of_sample(read_sample(samples, index), objective, empty_BLD)

        videos = [Video(str(index), partial(of_held_out, index)) for index in range(held_out)]
        videos += [Video(one.prompt.name, partial(of_prompt, one, objective, empty_BLD)) for one in prompts]
        with self._evaluating(model) as plain:
            self.drawing.draw(plain, step, videos)
        if held_out and samples and self.runtime.main:
            captions = [read_sample(samples, index).caption for index in range(held_out)]
            commit_bytes(self.drawing.folder / CAPTIONS_FILE, json.dumps(captions, ensure_ascii=False).encode())

    def loss(self, model: torch.nn.Module) -> float:
        """Mean velocity loss over all held-out samples and `TIMESTEPS`, at the posteriors' means."""
        import torch

        held_out, objective = self.held_out, self.drawing.objective
        assert held_out
        collate = Collator(objective, HELD_OUT_SEED, held_out=True)
        groups = self.run.groups
        rounds = -(-len(held_out) // groups.count)
        rows = []
        with self._evaluating(model) as plain, stage("validating", rounds, "sample") as bar:
            for number in range(rounds):
                self.drawing.go_on()
                index = number * groups.count + groups.of(self.runtime.rank)
                # A group that has none left repeats the first: under ZeRO-3 all ranks run every forward pass.
                stored = self._read(held_out, index if index < len(held_out) else 0)
                row = []
                for timestep in TIMESTEPS:
                    batch = collate([stored], [Slot(index, 0, 0)], [timestep]).to(self.runtime.device)
                    with self.runtime.accelerator.autocast():
                        row.append(objective.losses(plain, batch, self.runtime.dtype)[0])
                rows.append(torch.stack(row))
                bar.advance()
        losses_RT = groups.once(self.runtime.accelerator.gather(torch.stack(rows))).double().cpu()  # group by group
        by_sample = losses_RT.view(groups.count, rounds, -1).transpose(0, 1).reshape(-1, len(TIMESTEPS))
        by_sample = by_sample[: len(held_out)]
        for index in (~by_sample.isfinite().all(1)).nonzero().flatten().tolist():
            extent = held_out.extent(index)
            self.log.say(
                f"note: the held-out loss of {extent.key} in {held_out.shards[extent.shard].shown} is not finite"
            )
        values = by_sample.flatten().tolist()
        # `math.fsum` takes no sum of infinities of both signs.
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan

    def _read(self, held_out: ShardSet, index: int) -> StoredSample:
        """A held-out sample; when any rank cannot read its own, all stop together."""
        return self.runtime.peers.together(lambda: read_sample(held_out, index))

    @contextmanager
    def _evaluating(self, model: torch.nn.Module) -> Iterator[Any]:
        """The plain model in evaluation mode, without gradients; back as it was afterwards."""
        import torch

        plain = self.runtime.plain(model)
        was = plain.training
        plain.eval()
        try:
            with torch.no_grad():
                yield plain
        finally:
            plain.train(was)
