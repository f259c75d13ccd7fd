"""Chooses the VAE's encoder: the fused one where it agrees with diffusers' on this GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from .fused import Ways

EncoderName = Literal["fused", "diffusers"]

# Two encodes in the same number type differ by its rounding: about 0.3% in bf16 on the trained tiny VAE.
# A kernel that is wrong is off by 100%.
_TOLERANCE = {2: 0.05, 4: 0.02}  # by bytes a number; convolutions in fp32 run in tf32


@dataclass(frozen=True)
class Choice:
    """The encoder in place, how far it is from diffusers' (relative, rms), and why it is not the fused one."""

    encoder: EncoderName
    difference: float | None = None
    why: str = ""


def use_fused_encoder(vae: Any, device: torch.device) -> Choice:
    """Put the fused encoder into the VAE if this GPU runs it right; takes a second or two.

    Kernels are compiled on the user's machine, by the Triton that came with their
    PyTorch, for a GPU that we may never have tested. So the encoder is tried on a short
    clip and a picture, and compared: first the ways that were measured to be the fastest, then the plain
    ones; if anything fails with both, diffusers' encoder stays.
    """
    plain = vae.encoder
    why = ""
    try:
        from .fused import WAYS, Ways

        clip = _trial_clip(vae.dtype, device)
        samples = (clip, clip[:, :, :1].contiguous())
        wanted = [vae.encode(sample).latent_dist.parameters.double() for sample in samples]
        for ways in dict.fromkeys((WAYS, Ways())):
            try:
                difference = _difference(vae, plain, ways, samples, wanted)
                if difference < _TOLERANCE[vae.dtype.itemsize]:  # False for NaN, too
                    return Choice("fused", difference)
                why = why or f"the fused encoder is {difference:.1%} off on this GPU"
            except Exception as error:
                why = why or _words(error)
    except Exception as error:  # whatever a compiler or driver raises costs speed, never the run
        why = _words(error)
    vae.encoder = plain
    return Choice("diffusers", why=why)


def _difference(
    vae: Any, plain: Any, ways: Ways, samples: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> float:
    """Put the fused encoder into the VAE, and compare it; relative, rms, the largest of all.

    Args:
        samples: a clip of several chunks, and others.
        wanted: diffusers' moments of each.
    """
    import torch

    from .chunks import Together
    from .fused import FusedEncoder
    from .kernels import TritonKernels

    vae.encoder = FusedEncoder(plain, TritonKernels(), ways)
    found = [vae.encode(sample).latent_dist.parameters.double() for sample in samples]
    pairs = list(zip(found, wanted, strict=True))
    if ways.together:
        found_together = vae.encoder.clip(samples[0], vae.num_sample_frames_batch_size, Together(2, 3))
        pairs.append((found_together.double(), wanted[0]))
    return torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).max().item()  # NaN, if one is


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _trial_clip(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Smooth shapes with some noise: three chunks, the first of nine frames; smaller than a tile."""
    import torch

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 5, 8, 12), generator=generator)
    clip = torch.nn.functional.interpolate(coarse, size=(25, 128, 192), mode="trilinear")
    clip = clip + 0.05 * torch.randn(clip.shape, generator=generator)
    return (clip * 2 - 1).to(device, dtype)
