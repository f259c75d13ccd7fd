"""Embeds the prompts of validation, before the transformer is there; the run's folder keeps what was embedded."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogcommon.cli.progress import stage
from cogcommon.errors import RunError
from cogcommon.files.atomic import commit_bytes
from cogcommon.model.text_encoder import TextEncoder
from cogcommon.shards.records import IMAGE, TEXT

from ..data.prompts import Prompt, cut_notes, read_first_frame, shortened
from ..distributed.strategy import Runtime
from ..runs.folder import embedding_file
from ..runs.log import RunLog
from ..runs.run import Run

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EmbeddedPrompt:
    """A prompt as the transformer takes it, on the CPU.

    Attributes:
        text_LD: last hidden state of T5.
        conditions: the family's, by name; I2V's image is (1, C, h, w), unscaled.
    """

    prompt: Prompt
    text_LD: torch.Tensor
    conditions: dict[str, torch.Tensor]


def embed_prompts(run: Run, runtime: Runtime, folder: Path, log: RunLog) -> list[EmbeddedPrompt]:
    """The run's prompts, embedded; every rank calls it, and rank 0 alone loads T5, for those that are new.

    Call it before a weight of the transformer is loaded: T5-XXL has as many.

    Args:
        folder: of the run.

    Raises:
        ModelError, DiskError: they cannot be embedded, or kept.
        RunError: what was kept is damaged.
    """
    if not run.prompts:
        return []
    peers = runtime.peers

    def embed() -> list[bytes]:
        if not runtime.main:
            return []
        if new := run.new_prompts:
            _embed(new, run, runtime, folder, log)
        return [embedding_file(folder, prompt.name).read_bytes() for prompt in run.prompts]

    kept = peers.broadcast(peers.together(embed))
    return [_read(prompt, data, folder) for prompt, data in zip(run.prompts, kept, strict=True)]


def _embed(new: Sequence[Prompt], run: Run, runtime: Runtime, folder: Path, log: RunLog) -> None:
    """Embed prompts, and keep them; T5 has gone when the VAE comes."""
    import safetensors.torch

    for note in cut_notes([(f"--validate-prompt {shortened(one.text)}", one.text) for one in new], run.checkpoint):
        log.say(f"note: {note}")
    embedding_file(folder, new[0].name).parent.mkdir(parents=True, exist_ok=True)
    texts = list(_texts(new, run, runtime))
    _make_room(runtime)
    images = list(_images(new, run, runtime, folder)) if run.checkpoint.family.conditions else [{}] * len(new)
    _make_room(runtime)
    for prompt, text_LD, named in zip(new, texts, images, strict=True):
        commit_bytes(
            embedding_file(folder, prompt.name), safetensors.torch.save({TEXT: text_LD.contiguous(), **named})
        )  # fmt: skip


def _texts(prompts: Sequence[Prompt], run: Run, runtime: Runtime) -> Iterator[torch.Tensor]:
    """T5's last hidden state (L, D) of each."""
    with stage("loading T5"):
        encoder = TextEncoder(run.checkpoint, runtime.device, runtime.dtype)
    with stage("embedding", len(prompts), "prompt") as bar:
        for start in range(0, len(prompts), encoder.batch):
            some = prompts[start : start + encoder.batch]
            yield from (text_LD for text_LD, _ in encoder.encode_batch([prompt.text for prompt in some]))
            bar.advance(by=len(some))


def _images(prompts: Sequence[Prompt], run: Run, runtime: Runtime, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The unscaled latent (1, C, h, w) of the first frame of each, the posterior's mean; the frame goes beside it."""
    import torch

    with stage("loading the VAE"):
        vae: Any = run.checkpoint.load_vae(runtime.dtype).to(runtime.device)
    with stage("encoding", len(prompts), "first frame") as bar:
        for prompt in prompts:
            assert prompt.image is not None, prompt
            frame, picture = read_first_frame(prompt.image, prompt.size, "--validate-image"), io.BytesIO()
            frame.save(picture, "PNG")
            commit_bytes(embedding_file(folder, prompt.name).with_suffix(".png"), picture.getvalue())
            pixels_CHW = torch.from_numpy(np.array(frame)).permute(2, 0, 1).to(runtime.device, torch.float32)
            pixels_CHW = pixels_CHW / 127.5 - 1
            with torch.inference_mode():
                mean_BCFHW = vae.encode(pixels_CHW[None, :, None].to(vae.dtype)).latent_dist.mean
            bar.advance()
            yield {IMAGE: mean_BCFHW[0].transpose(0, 1).float().cpu().contiguous()}


def _make_room(runtime: Runtime) -> None:
    """Give back what a model has left that has gone."""
    import torch

    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def _read(prompt: Prompt, data: bytes, folder: Path) -> EmbeddedPrompt:
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
        return EmbeddedPrompt(prompt, tensors.pop(TEXT), tensors)
    except Exception as error:  # safetensors has no public class for it
        raise RunError(
            f"the embedding of {shortened(prompt.text)} is damaged",
            where=str(embedding_file(folder, prompt.name)),
            fix="remove it: the same command embeds the prompt again",
        ) from error
