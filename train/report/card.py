"""The model card that goes with exported weights: ``README.md``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Literal

from cogcommon.cli.names import json_text, plain
from cogcommon.files.ownership import Made
from cogcommon.model.device import DTYPES
from cogcommon.model.families import BUILTIN_NAMES, BY_NAME, RANDOM
from cogcommon.words import counted

from ..runs.folder import CARD_FILE, RecordedRun, lowest
from ..settings.results import GUIDANCE, STEPS
from .chart import number, smoothed
from .drawn import Drawn, drawn_with
from .published import published_model, published_settings

Kind = Literal["lora", "comfyui", "peft", "transformer"]

_LOAD = "pipe = {pipeline}.from_pretrained({model}, torch_dtype=torch.{dtype})"
_USE: dict[Kind, str] = {
    "lora": _LOAD + '\npipe.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors")',
    "comfyui": "",
    "peft": _LOAD + "\npipe.transformer = PeftModel.from_pretrained(pipe.transformer, weights)",
    "transformer": "transformer = CogVideoXTransformer3DModel.from_pretrained(\n"
    '    weights, subfolder="transformer", torch_dtype=torch.{dtype}\n)\n'
    + _LOAD.replace("{model},", "{model}, transformer=transformer,"),
}
_COMFYUI = """Put `{file}` into `models/loras` of ComfyUI, and load it with *LoraLoaderModelOnly* behind *Load Diffusion
Model* of ComfyUI's own CogVideoX; strength 1 is the LoRA as it was trained. (kijai's ComfyUI-CogVideoXWrapper takes the
diffusers form.)"""
_MOST_SAMPLES = 4
SAMPLES = "samples"  # videos that go with an export


def write_card(folder: Path, run: RecordedRun, kind: Kind, step: int | None = None) -> Path | None:
    """Write the card beside the weights, unless somebody has written in it: then it stays, and None is returned.

    The run's videos of these weights go with an export, into ``samples/``.

    Args:
        folder: that holds the weights, and a record.
        kind: of weights.
        step: at which the weights are; None: the one that the run has exported.
    """
    made = Made.read(folder)
    assert made, folder
    if os.path.lexists(folder / CARD_FILE) and not made.owns(CARD_FILE):
        return None
    step = run.exported if step is None else step
    shown: dict[str, Drawn] = {}
    for index, sample in enumerate(drawn_with(run, step)[:_MOST_SAMPLES]):
        name = f"{SAMPLES}/{index}.mp4"
        if folder.absolute() == run.folder.absolute():
            name = sample.video.relative_to(run.folder).as_posix()
        elif made.owns(name) or not os.path.lexists(folder / name):
            (folder / SAMPLES).mkdir(exist_ok=True)
            made.commit_bytes(name, sample.video.read_bytes())
        shown[name] = sample
    if before := [name for name in made.files if name.startswith(f"{SAMPLES}/") and name not in shown]:
        made.forget(*before)  # of weights that this folder no longer holds
    return made.commit_bytes(CARD_FILE, plain(card(run, kind, step, folder.absolute(), shown)).encode())


def card(run: RecordedRun, kind: Kind, step: int, folder: Path, shown: Mapping[str, Drawn]) -> str:
    """The card, as Markdown with the header that model hubs read.

    Args:
        folder: of the weights, in which its code works.
        shown: videos, by their names in the folder.
    """
    facts = run.facts
    i2v, base = facts.task == "i2v", published_model(facts.model, facts.family)
    header = {
        "base_model": base,
        "library_name": "peft" if kind == "peft" else "diffusers",
        "pipeline_tag": "image-to-video" if i2v else "text-to-video",
        "tags": ["cogvideox", *{"transformer": [], "comfyui": ["lora", "comfyui"]}.get(kind, ["lora"])],
        **({"instance_prompt": facts.id_token} if facts.id_token else {}),
        **({"widget": [{"text": one.prompt, "output": {"url": name}} for name, one in shown.items()]} if shown else {}),
    }
    # JSON is YAML, and below TOML, where an emoji stands as it is: neither has the two \u that ASCII takes for it.
    yaml = "\n".join(f"{name}: {json_text(value, indent=None)}" for name, value in header.items())
    sizes = ", ".join(f"{bucket} ({count:,})" for bucket, count in facts.samples.items())
    rows = {
        "base model": base + (f" at `{facts.revision}`" if facts.revision else ""),
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
    published = published_settings(run.settings, facts.family)
    settings = "\n".join(f"{name} = {json_text(value, indent=None)}" for name, value in published.items())
    prompt = next((one.prompt for one in shown.values()), f"{facts.id_token} ...".strip())
    trigger = f"Begin each prompt with the word it was trained with: `{facts.id_token}`.\n\n" if facts.id_token else ""
    videos = "\n\n".join(
        f'<video controls preload="metadata" width="480" src="{escape(name)}"></video>\n\n> {_in_a_line(one.prompt)}'
        + (f"\n\nDrawn with {_in_a_line(one.otherwise)}." if one.otherwise else "")
        for name, one in shown.items()
    )
    use = _COMFYUI.format(file=_comfyui_file(folder)) if kind == "comfyui" else _code(run, kind, prompt)
    return f"""---
{yaml}
---

# {facts.title} of {base}

{trigger}{videos + chr(10) * 2 if videos else ""}{use}

| | |
|---|---|
{table}

The settings of the run:

```toml
{settings}
```
"""


def _in_a_line(text: str) -> str:
    return escape(" ".join(text.split()))


def _comfyui_file(folder: Path) -> str:
    return next((path.name for path in sorted(folder.glob("*-comfyui.safetensors"))), "the file")


def _code(run: RecordedRun, kind: Kind, prompt: str) -> str:
    """Python that draws a video with the weights, in their folder."""
    facts = run.facts
    family = BY_NAME[facts.family]
    i2v = facts.task == "i2v"
    pipeline = "CogVideoXImageToVideoPipeline" if i2v else "CogVideoXPipeline"
    builtin = facts.model.removeprefix(RANDOM) in BUILTIN_NAMES  # diffusers knows it by its folder only
    base = published_model(facts.model, facts.family)
    quoted = json.dumps(base, ensure_ascii=False)  # as Python writes it, too
    model = f"builtin_folder({quoted})" if builtin else quoted
    names = ", CogVideoXTransformer3DModel" if kind == "transformer" else ""
    helpers = "export_to_video" + (", load_image" if i2v else "")
    more = "from peft import PeftModel\n" if kind == "peft" else ""
    more += "from cogcommon.model.tiny import builtin_folder\n" if builtin else ""
    size = facts.size
    options = [f"num_frames={size.frames}", f"height={size.height}", f"width={size.width}"]
    options += [f"num_inference_steps={STEPS}", f"guidance_scale={GUIDANCE}"]
    options += [] if family.ddim else ["use_dynamic_cfg=True"]
    options += [] if family.text_tokens == 226 else [f"max_sequence_length={family.text_tokens}"]  # diffusers' default
    image = 'image=load_image("first_frame.png"), ' if i2v else ""
    elsewhere = "" if builtin or "/" in base else f"# {quoted} is a folder: give yours of that base model\n"
    load = _USE[kind].format(pipeline=pipeline, model=model, dtype=DTYPES[facts.precision])
    return f"""```python
import torch
from diffusers import {pipeline}{names}
from diffusers.utils import {helpers}  # it writes videos by imageio: pip install imageio imageio-ffmpeg
{more}
weights = "."  # this folder; elsewhere its path, or what it is called on the hub
{elsewhere}{load}
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()
prompt = {json.dumps(prompt, ensure_ascii=False)}
video = pipe(
    prompt, {image}{", ".join(options)}
).frames[0]
export_to_video(video, "video.mp4", fps={family.fps})
```"""


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
