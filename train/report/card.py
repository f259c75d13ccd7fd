"""The model card that goes with exported weights: ``README.md``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from cogcommon.cli.names import plain
from cogcommon.files.ownership import Made
from cogcommon.model.device import DTYPES
from cogcommon.model.families import BUILTIN_NAMES, RANDOM
from cogcommon.words import counted

from ..runs.folder import CARD_FILE, RecordedRun, lowest
from .chart import number, smoothed

Kind = Literal["lora", "peft", "transformer"]

_LOAD = "pipe = {pipeline}.from_pretrained({model}, torch_dtype=torch.{dtype})"
_USE: dict[Kind, str] = {
    "lora": _LOAD + '\npipe.load_lora_weights("{folder}")',
    "peft": _LOAD + '\npipe.transformer = PeftModel.from_pretrained(pipe.transformer, "{folder}")',
    "transformer": "transformer = CogVideoXTransformer3DModel.from_pretrained(\n"
    '    "{folder}/transformer", torch_dtype=torch.{dtype}\n)\n'
    + _LOAD.replace("{model},", "{model}, transformer=transformer,"),
}


def write_card(folder: Path, run: RecordedRun, kind: Kind, step: int | None = None) -> Path | None:
    """Write the card beside the weights, unless somebody has written in it: then it stays, and None is returned.

    Args:
        folder: that holds the weights, and a record.
        kind: of weights.
        step: at which the weights are; None: the one that the run has exported.
    """
    made = Made.read(folder)
    assert made, folder
    if os.path.lexists(folder / CARD_FILE) and not made.owns(CARD_FILE):
        return None
    text = card(run, kind, run.exported if step is None else step, folder.name)
    return made.commit_bytes(CARD_FILE, plain(text).encode())


def card(run: RecordedRun, kind: Kind, step: int, folder: str) -> str:
    """The card, as Markdown with the header that model hubs read."""
    facts = run.facts
    i2v = facts.task == "i2v"
    pipeline = "CogVideoXImageToVideoPipeline" if i2v else "CogVideoXPipeline"
    names = {"lora": "", "peft": "", "transformer": ", CogVideoXTransformer3DModel"}[kind]
    builtin = facts.model.removeprefix(RANDOM) in BUILTIN_NAMES  # diffusers knows it by its folder only
    quoted_model = json.dumps(facts.model, ensure_ascii=False)  # as Python writes it, too
    model = f"builtin_folder({quoted_model})" if builtin else quoted_model
    folder = json.dumps(folder, ensure_ascii=False)[1:-1]
    use = _USE[kind].format(pipeline=pipeline, model=model, dtype=DTYPES[facts.precision], folder=folder)
    more_imports = "from peft import PeftModel\n" if kind == "peft" else ""
    more_imports += "from cogcommon.model.tiny import builtin_folder\n" if builtin else ""
    header = {
        "base_model": facts.model,
        "library_name": "peft" if kind == "peft" else "diffusers",
        "pipeline_tag": "image-to-video" if i2v else "text-to-video",
        "tags": ["cogvideox", *(["lora"] if kind != "transformer" else [])],
    }
    yaml = "\n".join(f"{name}: {json.dumps(value)}" for name, value in header.items())
    sizes = ", ".join(f"{bucket} ({count:,})" for bucket, count in facts.samples.items())
    rows = {
        "base model": facts.model + (f" at `{facts.revision}`" if facts.revision else ""),
        "family": f"{facts.family}, {facts.task}",
        "steps": f"{step:,} of {facts.steps:,}",
        "global batch": f"{facts.global_batch:,}",
        "samples": f"{sum(facts.samples.values()):,}: {sizes}",
        "shards' fingerprint": f"`{facts.shards_fingerprint}`",
        "encoding's fingerprint": f"`{facts.contract_fingerprint}`",
        **_losses(run, step),
        "trained with": f"cogtrain {facts.version}, {facts.strategy}, {facts.precision}, {facts.device}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in run.settings.items())
    return f"""---
{yaml}
---

# {facts.title} of {facts.model}

```python
import torch
from diffusers import {pipeline}{names}
{more_imports}
{use}
```

| | |
|---|---|
{table}

The settings of the run:

```toml
{settings}
```
"""


def _losses(run: RecordedRun, step: int) -> dict[str, str]:
    rows = {}
    losses = [(line.step, line.loss) for line in run.steps if line.loss is not None and line.step <= step]
    if losses:
        rows["training loss, smoothed"] = number(smoothed(losses)[-1][1])
    validations = [line for line in run.validations if line.step <= step]
    if validations:
        last = validations[-1]
        tuned, base = ("not finite" if loss is None else number(loss) for loss in (last.val_loss, last.base_val_loss))
        rows["held-out loss"] = f"{tuned} at step {last.step:,}; the base model's is {base}"
        if run.settings.get("keep_best") and lowest(run.validations) == last:
            rows["held-out loss"] += f"; the lowest of {counted(len(run.validations), 'validation')}"
    return rows
