"""How long the VAE will take for a clip, on a card that is here or was named, from what was measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from cogcommon.errors import SettingError
from cogcommon.model.cards import Card, card_like, card_named
from cogcommon.model.device import gpu_name
from cogcommon.model.families import Resolution

from .choice import EncoderName

# Seconds of a clip, in bf16 and whole frames (`python -m workshop.bench_encode`; workshop/LEDGER.md). Time goes with
# the pixels (4.97 times the time at 81x768x1360, which has 5.00 times the pixels).
_MEASURED: dict[EncoderName, float] = {"fused": 0.26, "diffusers": 0.96}
_TILED = 1.41 / 0.96  # of diffusers' encoder
_CLIP, _CARD = Resolution(49, 480, 720), "H200"


@dataclass(frozen=True)
class VaeSpeed:
    """The VAE's speed on one card.

    Attributes:
        card: in words.
        encoder: that will run there.
        relative: the card's seconds over an H200's.
        why: what these seconds are, in words.
    """

    card: str
    encoder: EncoderName
    relative: float
    why: str

    def seconds(self, frames: int, height: int, width: int, *, tiled: bool = False) -> float:
        """Of one clip, or of so many single frames."""
        share = frames * height * width / (_CLIP.frames * _CLIP.height * _CLIP.width)
        return _MEASURED[self.encoder] * self.relative * share * (_TILED if tiled else 1.0)

    def __str__(self) -> str:
        run = "fused" if self.encoder == "fused" else "diffusers'"
        return f"the VAE's {run} encoder on one {self.card}: {self.why}, scaled by pixels"


def vae_speed(named: str | None) -> VaeSpeed:
    """The speed on the card of a name, else on this machine's, else on an H200.

    Raises:
        SettingError: there is no such card, or its name says only its memory.
    """
    if named is not None:
        card = card_named(named)
        if card.rate is None:
            raise SettingError(
                f"{named} says how much memory a card has, and not how fast it is",
                where="--gpu",
                fix="the card's name, for example --gpu 4090",
            )
        return _speed_of(card, "fused")
    name = gpu_name()
    reference = card_like(_CARD)
    assert reference is not None
    if name is None:
        return _speed_of(reference, "fused", " (there is no GPU here; --gpu 4090 for yours)")
    encoder: EncoderName = "fused" if find_spec("triton") else "diffusers"
    here = card_like(name)
    if here is None or here.rate is None:
        return _speed_of(reference, encoder, f" ({name} is not in our table)")
    return _speed_of(here, encoder)


def _speed_of(card: Card, encoder: EncoderName, more: str = "") -> VaeSpeed:
    reference = card_like(_CARD)
    assert reference and reference.rate and card.rate
    measured = f"{_MEASURED[encoder]} s a clip of {_CLIP} in bf16, measured"
    relative = reference.rate / card.rate
    why = measured + more
    if card.name != _CARD:
        why = f"{_MEASURED[encoder] * relative:.2g} s a clip of {_CLIP}, computed from {measured} on an {_CARD}, "
        why += "and the cards' published rates"
    return VaeSpeed(card.name, encoder, relative, why)
