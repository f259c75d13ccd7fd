"""GPUs by name: their memory, what they compute, how they are reached. One table, from their makers' data sheets.

``rate`` is the published dense rate of matrix products in half precision with sums in fp32, in TFLOP/s: bf16's, or
fp16's where a card has no bf16. Data sheets often print twice as much, for matrices of which half is zero; GeForce
cards of the 20, 30 and 40 series do twice as much with sums in fp16, which nobody trains with. Sources: NVIDIA's data
sheets of T4, V100, A10, A30, A40, A100, H100, H200, H20, L4, L40, L40S and DGX B200/B300; the architecture white
papers of Turing (RTX 20), GA102 (RTX 30, A6000), Ada (RTX 40, 6000 Ada) and Blackwell (RTX 50, PRO 6000), appendices
with "peak FP16/BF16 tensor TFLOPS with FP32 accumulate". A card that is not in them is computed as they do it: tensor
cores x operations a clock x boost clock.

``usable`` is what the driver gives a process to begin with, in GiB (``torch.cuda.mem_get_info`` of an idle card, as
published logs of torch have it); with error correction a GDDR card keeps a sixteenth for itself.

``link`` is an assumption, three quarters of the card's PCIe in one direction, in GB/s, on a host as new as the card:
what a copy from page-locked memory gets. Where a GPU is there, a copy is timed instead (`memory.link`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..errors import SettingError
from ..words import GIB, did_you_mean


@dataclass(frozen=True)
class Card:
    """One GPU, or an amount of memory of which nothing else is known."""

    name: str
    sold: int  # GB that it is sold with
    usable: float  # GiB of it
    rate: float | None = None  # TFLOP/s, dense
    link: float = 12.0  # GB/s
    bf16: bool = True  # in hardware; else it is emulated, many times as slowly

    @property
    def bytes(self) -> int:
        return int(self.usable * GIB)


_PCIE3, _PCIE4_X8, _PCIE4, _PCIE5_X8, _PCIE5 = 12.0, 12.0, 24.0, 24.0, 48.0
_NVLINK_C2C = 300.0  # Grace's memory

CARDS: tuple[Card, ...] = (
    Card("RTX 2060", 6, 5.8, 25.8, _PCIE3, bf16=False),
    Card("RTX 2070", 8, 7.8, 29.9, _PCIE3, bf16=False),
    Card("RTX 2080", 8, 7.8, 40.3, _PCIE3, bf16=False),
    Card("RTX 2080 Ti", 11, 10.7, 53.8, _PCIE3, bf16=False),
    Card("RTX 3060", 12, 11.7, 25.5, _PCIE4),
    Card("RTX 3060 Ti", 8, 7.8, 32.4, _PCIE4),
    Card("RTX 3070", 8, 7.8, 40.6, _PCIE4),
    Card("RTX 3070 Ti", 8, 7.8, 43.5, _PCIE4),
    Card("RTX 3080", 10, 9.7, 59.5, _PCIE4),
    Card("RTX 3080 12GB", 12, 11.7, 61.3, _PCIE4),
    Card("RTX 3080 Ti", 12, 11.7, 68.2, _PCIE4),
    Card("RTX 3090", 24, 23.6, 71.2, _PCIE4),
    Card("RTX 3090 Ti", 24, 23.6, 80.0, _PCIE4),
    Card("RTX 4060", 8, 7.6, 30.2, _PCIE4_X8),
    Card("RTX 4060 Ti", 8, 7.6, 44.1, _PCIE4_X8),
    Card("RTX 4060 Ti 16GB", 16, 15.6, 44.1, _PCIE4_X8),
    Card("RTX 4070", 12, 11.6, 58.3, _PCIE4),
    Card("RTX 4070 Super", 12, 11.6, 71.0, _PCIE4),
    Card("RTX 4070 Ti", 12, 11.6, 80.2, _PCIE4),
    Card("RTX 4070 Ti Super", 16, 15.6, 88.2, _PCIE4),
    Card("RTX 4080", 16, 15.6, 97.5, _PCIE4),
    Card("RTX 4080 Super", 16, 15.6, 104.4, _PCIE4),
    Card("RTX 4090", 24, 23.5, 165.2, _PCIE4),
    Card("RTX 5060 Ti", 8, 7.5, 47.4, _PCIE5_X8),
    Card("RTX 5060 Ti 16GB", 16, 15.4, 47.4, _PCIE5_X8),
    Card("RTX 5070", 12, 11.5, 61.7, _PCIE5),
    Card("RTX 5070 Ti", 16, 15.4, 87.9, _PCIE5),
    Card("RTX 5080", 16, 15.4, 112.6, _PCIE5),
    Card("RTX 5090", 32, 31.3, 209.5, _PCIE5),
    Card("TITAN RTX", 24, 23.6, 130.5, _PCIE3, bf16=False),
    Card("T4", 16, 14.5, 65.0, _PCIE3, bf16=False),
    Card("V100", 16, 15.7, 125.0, _PCIE3, bf16=False),
    Card("V100 32GB", 32, 31.7, 125.0, _PCIE3, bf16=False),
    Card("A10", 24, 22.0, 125.0, _PCIE4),
    Card("A10G", 24, 22.0, 70.0, _PCIE4),
    Card("A30", 24, 23.4, 165.0, _PCIE4),
    Card("A40", 48, 44.3, 149.7, _PCIE4),
    Card("RTX A4000", 16, 15.6, 76.7, _PCIE4),
    Card("RTX A5000", 24, 23.5, 111.1, _PCIE4),
    Card("RTX A6000", 48, 47.4, 154.8, _PCIE4),
    Card("RTX 4000 Ada", 20, 19.5, 107.0, _PCIE4),
    Card("RTX 5000 Ada", 32, 31.3, 261.1, _PCIE4),
    Card("RTX 6000 Ada", 48, 47.4, 364.2, _PCIE4),
    Card("RTX PRO 6000", 96, 94.9, 503.8, _PCIE5),
    Card("L4", 24, 22.0, 121.0, _PCIE4),
    Card("L40", 48, 44.3, 181.0, _PCIE4),
    Card("L40S", 48, 44.3, 362.0, _PCIE4),
    Card("A100", 40, 39.3, 312.0, _PCIE4),
    Card("A100 80GB", 80, 79.1, 312.0, _PCIE4),
    Card("H20", 96, 95.0, 148.0, _PCIE5),
    Card("H100", 80, 79.1, 989.4, _PCIE5),
    Card("H100 PCIe", 80, 79.1, 756.5, _PCIE5),
    Card("H100 NVL", 94, 93.0, 835.5, _PCIE5),
    Card("GH200", 96, 94.5, 989.4, _NVLINK_C2C),
    Card("H200", 141, 139.8, 989.4, _PCIE5),
    Card("B200", 180, 178.3, 2250.0, _PCIE5),
    Card("B300", 288, 268.0, 2250.0, _PCIE5),
)

# What people and drivers add to a name, and it says nothing more: "NVIDIA A100-SXM4-80GB" is the A100 80GB.
_ADDED = re.compile(r"nvidia|geforce|tesla|quadro|graphics|generation|blackwell|workstation|server|edition|maxq|"
                    r"sxm\d?|hbm\d?e?|pcie(?!$)|rtx|gpu")  # fmt: skip


def card_named(text: str) -> Card:
    """A card by name (``4090``, ``rtx-3090``, ``a100-80``, ``H200``), or an amount of memory.

    GB are what cards are sold with, and stand for what the least of them gives (``24GB``: 22 GiB, an L4's). GiB are
    bytes that are free, of any card.

    Raises:
        SettingError: no card is called so, or has so much memory.
    """
    amount = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB?|GiB)?\s*", text, re.IGNORECASE)
    if found := card_like(text):
        return found
    if not amount:
        meant = _name_like(text)
        raise SettingError(
            f"no card that we know is called {text!r}",
            where="--gpu",
            fix=did_you_mean(
                [meant.name] if meant else [],
                "--gpu with its memory, as 24GB, or with one of: " + ", ".join(card.name for card in CARDS),
            ),
        )
    number, largest = float(amount[1]), max(CARDS, key=lambda card: card.usable)
    if (amount[2] or "").lower() == "gib":
        if 0 < number <= largest.usable:
            return Card(f"{number:g} GiB", round(number), number)
        raise SettingError(
            f"no card has {number:g} GiB free; the largest, {largest.name}, has {largest.usable:g}",
            where="--gpu",
            fix="--gpu 22GiB, or the name of a card",
        )
    sold = sorted({card.sold for card in CARDS})
    if number not in sold:
        near = sorted(sorted(sold, key=lambda size: abs(size - number))[:2])
        meant = _name_like(amount[1]) if number > sold[-1] else None  # 4091
        do = f"--gpu {as_typed(meant)}" if meant else " or ".join(f"--gpu {size}GB" for size in near)
        raise SettingError(
            f"no card is sold with {number:g} GB, nor called {text.strip()!r}",
            where="--gpu",
            fix=f"{do}; the name of a card; or what is free of one, as --gpu 22GiB",
        )
    least = min(card.usable for card in CARDS if card.sold == number)
    return Card(f"a card of {number:g} GB", int(number), least)


def card_like(name: str, total: int | None = None) -> Card | None:
    """The card of a name as people type it, or as a driver gives it; None where we know none.

    Args:
        total: its bytes, which tell cards of one name apart; without them it is the one with the least memory.
    """
    found = [card for card in CARDS if _plain(name) in _spellings(card)]
    return min(found, key=lambda card: card.sold if total is None else abs(card.bytes - total), default=None)


def sizes_note(text: str) -> str | None:
    """Which card a name without its memory is read as, where cards of it are sold with several; else None."""
    found = sorted((card for card in CARDS if _plain(text) in _spellings(card)), key=lambda card: card.sold)
    if len(found) < 2:
        return None
    taken, *others = found
    names = [f"{as_typed(card).removesuffix(f'-{card.sold}GB')}-{card.sold}GB" for card in others]
    return f"{text.strip()} is read as the {taken.sold} GB card; {' and '.join(names)} is another"


def as_typed(card: Card) -> str:
    """A card's name as one word of a command line."""
    return card.name.replace(" ", "-")


def _name_like(text: str) -> Card | None:
    """The card whose name is nearly this."""
    near = difflib.get_close_matches(_plain(text), [_plain(card.name) for card in CARDS], n=1, cutoff=0.75)
    return next((card for card in CARDS if [_plain(card.name)] == near), None)


def _spellings(card: Card) -> set[str]:
    """A card's name with and without its memory: ``a100``, ``a10080``, ``a10080g`` and ``a10080gb``."""
    plain = _plain(card.name).removesuffix(f"{card.sold}gb")
    return {plain, *(f"{plain}{card.sold}{unit}" for unit in ("", "g", "gb"))}


def _plain(name: str) -> str:
    return _ADDED.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))
