"""Which videos of a run were drawn with which of its weights.

The report says the training step on each; the model card shows those of its own weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogcommon.errors import CogError
from cogcommon.files.ownership import Made
from cogcommon.files.typed import parse_object
from cogcommon.model.families import BY_NAME

from ..runs.checkpoint import list_checkpoints, states_of, step_of
from ..runs.folder import CAPTIONS_FILE, GENERATED, VALIDATION, RecordedRun, drawn_prompts, exported_weights
from ..settings.results import GUIDANCE, STEPS


@dataclass(frozen=True)
class Drawn:
    """A video of a run.

    Attributes:
        otherwise: the settings in which it was drawn otherwise than the card's code and validation draw, in words.
    """

    prompt: str
    video: Path
    otherwise: str = ""


def asked_of(made: Made | None) -> Mapping[str, Any]:
    """All that the videos of a folder depend on, as `generate` and `compare` record it; empty where nothing is."""
    try:
        return parse_object(made.request) if made else {}
    except ValueError:
        return {}


def drawn_with(run: RecordedRun, step: int) -> list[Drawn]:
    """The videos of the weights after a step: what was generated with them, then validation's, prompts first.

    A generated video is of these weights if its record names them by their content (`states_of`), at full strength and
    on the base model of the run; weights that lie in the run's folder no longer have none.
    """
    kept, generated = kept_weights(run), []
    for video in sorted((run.folder / GENERATED).glob("*/tuned.mp4")):
        made = Made.read(video.parent)
        asked = asked_of(made)
        as_trained = asked.get("model") == run.facts.model and "strengths" not in asked
        if made and made.owns(video.name) and "prompt" in asked and as_trained and _found(kept, asked) == step:
            generated.append(Drawn(str(asked["prompt"]), video, _otherwise(run, asked)))
    generated.sort(key=lambda drawn: bool(drawn.otherwise))
    folder = run.folder / VALIDATION
    validated = list(drawn_prompts(run.folder).items())
    with suppress(OSError, ValueError, TypeError):
        captions = json.loads((folder / CAPTIONS_FILE).read_text(encoding="utf-8"))
        validated += [(str(index), str(caption)) for index, caption in enumerate(captions)]
    videos = [(prompt, folder / f"step-{step:06d}" / f"{name}.mp4") for name, prompt in validated]
    return generated + [Drawn(prompt, video) for prompt, video in videos if video.is_file()]


def kept_weights(run: RecordedRun) -> dict[tuple[str, ...], int]:
    """The steps of the weights that lie in a run's folder, by what those are (`states_of`)."""
    return dict(_kept(run))


def trained_step(kept: Mapping[tuple[str, ...], int], folder: Path) -> int | None:
    """The training step of the weights that a folder of generated videos was drawn with; None: not known.

    Args:
        kept: `kept_weights`, for videos that are older than this entry of their record.
    """
    asked = asked_of(Made.read(folder))
    step = asked.get("step")
    return step if isinstance(step, int) else _found(kept, asked)


def _kept(run: RecordedRun) -> Iterator[tuple[tuple[str, ...], int]]:
    exported = exported_weights(run.folder)
    named = [(path, step_of(path)) for path in list_checkpoints(run.folder)]
    for weights, step in named + ([(exported, run.exported)] if exported else []):
        with suppress(CogError, OSError):  # damaged, or removed meanwhile by the process that trains
            yield tuple(states_of(weights)), step


def _found(kept: Mapping[tuple[str, ...], int], asked: Mapping[str, Any]) -> int | None:
    states = asked.get("weights")
    return kept.get(tuple(map(str, states))) if isinstance(states, list) else None


def _otherwise(run: RecordedRun, asked: Mapping[str, Any]) -> str:
    """The settings of a generated video that are not as the card's code has them."""
    usual = {
        "steps": (STEPS, "{} sampling steps"),
        "guidance": (GUIDANCE, "guidance {}"),
        "resolution": (str(run.facts.size), "{}"),
        "precision": (run.facts.precision, "{}"),
        "fps": (BY_NAME[run.facts.family].fps, "{} frames a second"),
        "negative": ("", "the negative prompt: {}"),
    }
    return ", ".join(
        words.format(asked[name]) for name, (value, words) in usual.items() if asked.get(name, value) != value
    )
