"""The diffusers pipeline of a checkpoint with tuned weights in it: loaded, placed on a device, run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cogcommon.cli.progress import stage
from cogcommon.errors import RunError
from cogcommon.files.memory import free_gpu_memory
from cogcommon.media.video import Frames
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.families import Resolution

from ..blocks.load import Load
from ..blocks.plan import FORWARD
from ..data.prompts import shortened
from ..model import sft
from ..model.lora_file import FOLDED, read_lora
from ..model.method import Lora, of_checkpoint
from .tuned import Tuned
from .videos import DECODE_BYTES_PER_PIXEL, scheduler_of, tile_within

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
    from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """What to draw, the same for both models."""

    prompt: str
    image: Image | None
    resolution: Resolution
    steps: int
    guidance: float
    seed: int
    text_tokens: int
    dynamic_guidance: bool
    negative_prompt: str = ""


def load_pipeline(
    tuned: Tuned, dtype: torch.dtype, say: Callable[[str], None] = lambda text: None
) -> DiffusionPipeline:
    """The diffusers pipeline of the checkpoint, with the tuned weights in it, on the CPU.

    Args:
        say: is told how each LoRA file of another tool was understood.

    Raises:
        ModelError: the weights are of another model.
    """
    checkpoint = tuned.checkpoint
    checkpoint.check_weights("text_encoder", "vae")  # the transformer is checked when it is loaded, which is now
    if tuned.transformer_folder and tuned.method:
        transformer = of_checkpoint(tuned.method, checkpoint, tuned.transformer_folder, dtype).requires_grad_(False)
    elif tuned.transformer_folder:
        transformer = sft.load(tuned.transformer_folder, checkpoint, dtype)
    else:
        transformer = checkpoint.load_transformer(dtype)
    found = [] if tuned.method else [read_lora(one.file, checkpoint, transformer) for one in tuned.loras]
    pipeline = pipeline_of(checkpoint, transformer, dtype)
    if isinstance(tuned.method, Lora):
        pipeline.load_lora_weights(tuned.method.file_of(tuned.loras[0].file), adapter_name="lora-0")
    for number, file in enumerate(found):
        if file.alpha != FOLDED:
            say(str(file))
        if not file.alpha and tuned.loras[number].strength == 1:
            one = f"{1 / file.rank:.2g}"
            say(f"if its trainer had an alpha, give --lora FILE=alpha/{file.rank}; CogVideo's SAT has 1, so ={one}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of the LoRA before it
            pipeline.load_lora_weights(dict(file.state), adapter_name=f"lora-{number}")
    if tuned.loras:
        pipeline.set_adapters([f"lora-{n}" for n in range(len(tuned.loras))], [one.strength for one in tuned.loras])
    return pipeline


def pipeline_of(checkpoint: Checkpoint, transformer: CogVideoXTransformer3DModel, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a checkpoint with this transformer in it, on the CPU."""
    import diffusers

    name = "CogVideoXImageToVideoPipeline" if checkpoint.family.task == "i2v" else "CogVideoXPipeline"
    pipeline = getattr(diffusers, name)(
        tokenizer=checkpoint.load_tokenizer(),
        text_encoder=checkpoint.load_text_encoder(dtype),
        vae=checkpoint.load_vae(dtype),
        transformer=transformer.eval(),
        scheduler=scheduler_of(checkpoint),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def to_base(pipeline: DiffusionPipeline, tuned: Tuned, dtype: torch.dtype) -> None:
    """Put the untouched weights back: adapters off, or the checkpoint's own transformer."""
    pipeline.remove_all_hooks()  # of offloading; `move_pipeline` sets them again
    if tuned.loras:
        pipeline.unload_lora_weights()
    else:
        pipeline.transformer = None  # first let the tuned one go
        pipeline.register_modules(transformer=tuned.checkpoint.load_transformer(dtype).eval())


def move_pipeline(pipeline: DiffusionPipeline, device: torch.device, resolution: Resolution, step: int) -> None:
    """Put the pipeline on the device; on a small GPU one part, or one layer, at a time.

    Args:
        step: bytes that a sampling step works on, beside the weights (`step_bytes`).
    """
    import torch

    if device.type == "cpu":
        return
    parts = [
        [(parameter.numel() * parameter.element_size(), parameter.device) for parameter in part.parameters()]
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
    ]
    sizes = [sum(size for size, _ in part) for part in parts]
    there = sum(size for part in parts for size, at in part if at.type == device.type)
    free = free_gpu_memory(device) + there  # what it has there already is room for it
    resident = sum(sizes)
    if resident + step < free:
        pipeline.to(device)
    elif max(sizes) + step < free:
        pipeline.enable_model_cpu_offload(device=device)
        resident = max(sizes)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
        resident = 0
    decode = resolution.height * resolution.width * DECODE_BYTES_PER_PIXEL
    if resident + decode > free:
        pipeline.vae.enable_tiling(*tile_within(free - resident))


def step_bytes(checkpoint: Checkpoint, resolution: Resolution, guidance: float, item: int) -> int:
    """Bytes that a sampling step works on, beside the weights.

    Args:
        guidance: above 1 the pipelines draw with and without the prompt at once.
        item: bytes of a number as computed.
    """
    tokens = checkpoint.family.tokens(resolution)
    load = Load.of(checkpoint.transformer_config, tokens, batch=2 if guidance > 1 else 1, size=item, trained=0)
    return FORWARD * load.activation


def generate_video(pipeline: DiffusionPipeline, request: Request, advance: Callable[[], None]) -> Frames:
    """One video, uint8 RGB (F, H, W, 3). The seed alone decides the noise.

    Args:
        advance: called after every step.

    Raises:
        RunError: the model computed what is no number, which would be shown as black.
    """
    import torch

    decoding = ExitStack()  # the stage of what the pipeline does after its last step

    def after_step(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        if step + 1 == request.steps:
            decoding.enter_context(stage("decoding the video"))
        return tensors

    options: dict[str, Any] = {"image": request.image} if request.image is not None else {}
    with decoding:
        result = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_frames=request.resolution.frames,
            height=request.resolution.height,
            width=request.resolution.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            use_dynamic_cfg=request.dynamic_guidance,
            max_sequence_length=request.text_tokens,  # the pipeline's default is 1.0's
            generator=torch.Generator().manual_seed(request.seed),  # on the CPU: the same noise on every device
            output_type="np",
            callback_on_step_end=after_step,
            **options,
        )
    computed = np.asarray(result.frames[0])
    if not np.isfinite(computed).all():
        raise RunError(
            "the model computed what is no number, and the video would be black",
            where=f"{shortened(request.prompt)}, {pipeline.transformer.dtype}",
            fix="a LoRA at a smaller strength, --precision bf16 or fp32, or a --guidance nearer to 6",
        )
    frames: Frames = (computed * 255).round().astype(np.uint8)
    return frames
