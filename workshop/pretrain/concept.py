"""Whether fine-tuning learns: the judge names what a tuned built-in model draws, and what the base drew before.

The whole chain is asked at once, by what comes out of it: crop, VAE, T5, noise, schedule,
positions, adapters and their scale, the exported file, and diffusers' own pipeline that loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cogcommon.cli.progress import stage
from cogcommon.media.video import Frames
from cogcommon.model.tiny import NATIVE
from cogtrain.runs.folder import METRICS_FILE, read_metrics
from cogtrain.validation.pipeline import load_pipeline, to_base
from cogtrain.validation.tuned import find_tuned

from ..scenes import Scene, draw, every_scene, split_scenes
from .animation import Animation, Row, animate
from .exam import Marks, examine, motion_for
from .world import times


@dataclass(frozen=True)
class Proof:
    """Shares of clips, 0..1, and mean losses over the held-out samples; each (base, tuned)."""

    recognised: tuple[float, float]  # clips captioned with the new motion that show it
    kept: tuple[float, float]  # known scenes, never trained on, in the right shape and colour
    held_out_loss: tuple[float, float] | None  # None: the run validated nothing


def examine_run(
    run: Path,
    *,
    clips: int,
    steps: int,
    guidance: float,
    seed: int,
    device: str | torch.device = "cpu",
    batch: int = 10,
) -> tuple[Proof, Animation]:
    """Generate new and known scenes, tuned and base with the same seeds, and let the judge name them.

    The new scenes are the last of their list, of which `workshop.draw` takes the first; the known
    ones are held out, from the form and from `workshop.draw`.

    Args:
        run: folder of a finished run, LoRA or SFT.
        clips: of each kind.
        steps: of the sampler.
        batch: clips that are generated at once; the noise depends on it.

    Returns:
        The figures, and an animation: what was asked for, the base model's clips, the tuned one's.

    Raises:
        RunError, ModelError: no weights there, or not of a model that can be had.
    """
    tuned = find_tuned(run, [], None, None)
    pipeline = load_pipeline(tuned, torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    motion = motion_for(tuned.checkpoint.family)
    new, known = every_scene(0, [motion])[-clips:], split_scenes()[1][-clips:]

    def ask(scenes: list[Scene]) -> tuple[Marks, Frames]:
        return examine(
            pipeline, tuned.checkpoint, scenes, steps=steps, guidance=guidance, seed=seed, batch=batch,
            drawn=lambda count: bar.advance(by=count),
        )  # fmt: skip

    with stage("generating for the judge", 2 * (len(new) + len(known)), "video") as bar:
        (new_after, drawn_after), (known_after, _) = ask(new), ask(known)
        to_base(pipeline, tuned, torch.float32)
        pipeline.to(device)
        (new_before, drawn_before), (known_before, _) = ask(new), ask(known)
    proof = Proof(
        recognised=(new_before.motion, new_after.motion),
        kept=(known_before.shape_and_colour, known_after.shape_and_colour),
        held_out_loss=_held_out_loss(run),
    )
    places, moments = _four(new[: len(drawn_after)]), times(tuned.checkpoint.family)
    asked_NFHWC = np.stack([draw(new[place], moments, NATIVE.height, NATIVE.width) for place in places])
    before, after = (_told(motion, share, clips) for share in proof.recognised)
    rows = [
        Row("asked for", "drawn, not generated", asked_NFHWC),
        Row("base model", before, drawn_before[places]),
        Row("after fine-tuning", after, drawn_after[places]),
    ]
    captions = [new[place].caption for place in places]
    return proof, animate(f"A new motion: {motion}", captions, rows, tuned.checkpoint.family.fps)


def tell(proof: Proof) -> str:
    """The figures as a small table."""
    rows = [
        f"{'':<42}{'base':>7}{'tuned':>7}",
        f"{'the new motion is recognised':<42}{proof.recognised[0]:>7.0%}{proof.recognised[1]:>7.0%}",
        f"{'known scenes in the right shape and colour':<42}{proof.kept[0]:>7.0%}{proof.kept[1]:>7.0%}",
    ]
    if proof.held_out_loss:
        base, tuned = proof.held_out_loss
        rows.append(f"{'held-out loss':<42}{base:>7.3f}{tuned:>7.3f}  ({tuned / base - 1:+.0%})")
    return "\n".join(rows)


def _held_out_loss(run: Path) -> tuple[float, float] | None:
    _, validations = read_metrics(run / METRICS_FILE)
    if not validations:
        return None
    base, tuned = validations[-1].base_val_loss, validations[-1].val_loss
    return None if base is None or tuned is None else (base, tuned)


def _four(scenes: Sequence[Scene]) -> list[int]:
    """Places of the first scene of each of four shapes, whatever came of them; of fewer shapes, fewer."""
    first = {scene.shape: place for place, scene in reversed([*enumerate(scenes)])}
    return sorted(first.values())[:4]


def _told(motion: str, recognised: float, clips: int) -> str:
    return f"the judge sees that it {motion} in {round(recognised * clips)} of {clips} clips"
