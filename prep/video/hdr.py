"""HDR made SDR: from a PQ or HLG signal to the light of a display, to what an SDR display of 203 cd/m2 shows of it.

Light up to about 90 cd/m2 stays as it is; what is brighter is compressed by the EETF of Report ITU-R BT.2390, so that
the source's brightest becomes white. White is HDR's reference white, 203 cd/m2 (Report ITU-R BT.2408). The strongest
of a pixel's three colours is mapped, and the others are scaled alike: hues stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from av.video.frame import VideoFrame

from ..source.clip import TONED

Floats = np.ndarray[Any, np.dtype[np.float32]]
Words = np.ndarray[Any, np.dtype[np.uint16]]
Transfer = Literal["PQ", "HLG"]

WHITE = 203.0  # cd/m2

_HLG_PEAK = 1000.0  # of the display that HLG is made for, cd/m2
_USUAL_PEAK = 1000.0  # of a PQ source that does not say
_CODES = 1 << 16
_STEPS = 4096  # of a table of the EETF

# SMPTE ST 2084
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32

# Recommendation ITU-R BT.2100-2, table 5
_A = 0.17883277
_B, _C = 1 - 4 * _A, 0.5 - _A * np.log(4 * _A)
_OOTF_GAMMA = 1.2  # of a display of 1000 cd/m2
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)

_GAMMA = 2.4  # of an SDR display, Recommendation ITU-R BT.1886

# Chromaticities of red, green, blue by H.273's number of the primaries; white is D65.
_PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),  # BT.709
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # P3
}
_D65 = (0.3127, 0.3290)


@dataclass(frozen=True)
class Light:
    """What a clip's signal means in light."""

    transfer: Transfer
    primaries: int = 9  # H.273; what is not known counts as BT.2020
    peak: float = _USUAL_PEAK  # cd/m2, of the display that it was made on

    def __str__(self) -> str:
        return f"{self.transfer} up to {self.peak:.0f} cd/m2 {TONED}"


def light_of(frame: VideoFrame, transfer: Transfer, primaries: int) -> Light:
    """What a frame says of its light. The peak of PQ is that of its mastering display, where it is named."""
    if transfer == "HLG":
        return Light("HLG", primaries, _HLG_PEAK)
    told: Any = frame.side_data.get("MASTERING_DISPLAY_METADATA")
    peak = _USUAL_PEAK
    if told is not None:  # AVMasteringDisplayMetadata: eight chromaticities and two luminances, each a fraction; flags
        numbers = np.frombuffer(told, np.int32)
        if len(numbers) >= 22 and numbers[21] and numbers[19]:
            peak = float(numbers[18] / numbers[19])
    return Light("PQ", primaries, peak if WHITE <= peak <= 10_000 else _USUAL_PEAK)


def to_sdr(signal_HWC: Words, light: Light) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Signals as a BT.709 picture.

    Args:
        signal_HWC: RGB of the clip's own primaries, its range full, 16 bits.
    """
    nits = _table(light.transfer)[signal_HWC]
    if light.transfer == "HLG":
        nits *= (_HLG_PEAK * (nits @ _LUMA_2020) ** np.float32(_OOTF_GAMMA - 1))[..., None]
    nits = np.maximum(nits @ _to_709(light.primaries).T, 0)
    most = nits.max(axis=-1)
    levels, scales = _eetf(light.peak)
    bright = most > levels[1]
    nits[bright] *= np.interp(most[bright], levels, scales).astype(np.float32)[:, None]
    root = np.sqrt(np.minimum(nits * np.float32(1 / WHITE), 1))
    return _display()[(root * np.float32(_CODES - 1) + np.float32(0.5)).astype(np.uint16)]


@cache
def _table(transfer: Transfer) -> Floats:
    """Light of each 16-bit signal: of PQ on the display in cd/m2, of HLG in the scene, 0 to 1."""
    signal = np.arange(_CODES) / (_CODES - 1)
    if transfer == "PQ":
        return _from_pq(signal).astype(np.float32)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _C) / _A) + _B) / 12).astype(np.float32)


@cache
def _display() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The SDR signal of each light, of which the square root is 16 bits: evenly spaced as an eye sees it."""
    return np.rint((np.arange(_CODES) / (_CODES - 1)) ** (2 / _GAMMA) * 255).astype(np.uint8)


def _from_pq(signal: Any) -> Any:
    """Light in cd/m2 of a PQ signal, 0 to 1."""
    root = np.asarray(signal, np.float64) ** (1 / _M2)
    return 10_000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _to_pq(nits: Any) -> Any:
    """The PQ signal of a light in cd/m2."""
    power = (np.asarray(nits, np.float64) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


@cache
def _eetf(peak: float) -> tuple[Any, Any]:
    """Light in cd/m2 from the knee up to the source's peak and beyond, and what each is multiplied by.

    BT.2390-10, 5.4.1, for a black of 0 on both sides. The first entry is 0, the second the knee.
    """
    top = float(_to_pq(peak))
    target = float(_to_pq(WHITE)) / top  # maxLum
    knee = 1.5 * target - 0.5  # KS
    if target >= 1:  # nothing to compress
        return np.array([0.0, 1e9]), np.ones(2)
    signal = np.linspace(knee, 1, _STEPS)  # E1
    t = (signal - knee) / (1 - knee)
    mapped = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    )  # P
    levels = _from_pq(signal * top)
    scales = _from_pq(mapped * top) / levels
    beyond = np.geomspace(peak, 10_000 * 4, 64)[1:]  # brighter than the source can be: white
    return np.concatenate([[0.0], levels, beyond]), np.concatenate([[1.0], scales, WHITE / beyond])


@cache
def _to_709(primaries: int) -> Floats:
    """From linear RGB of these primaries to that of BT.709's."""
    theirs, ours = (_to_xyz(_PRIMARIES.get(number, _PRIMARIES[9])) for number in (primaries, 1))
    return (np.linalg.inv(ours) @ theirs).astype(np.float32)


def _to_xyz(corners: tuple[tuple[float, float], ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """From linear RGB to CIE XYZ (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in corners]).T
    white = np.array([_D65[0] / _D65[1], 1, (1 - _D65[0] - _D65[1]) / _D65[1]])
    return columns * np.linalg.solve(columns, white)
