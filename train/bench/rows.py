"""The rows of the benchmark, the most telling first, and the table they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cogcommon.families import BY_NAME, Resolution

Kind = Literal["fast", "auto", "low", "reference", "numerics"]

# Shape that goes through the same code in seconds on a CPU.
SMALL: Mapping[str, Any] = {
    "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 64, "text_embed_dim": 32,
    "sample_frames": 9, "sample_height": 8, "sample_width": 12,
}  # fmt: skip
SMALL_BUCKET = Resolution(9, 64, 96)


@dataclass(frozen=True)
class Row:
    """One thing to measure: a family and a way to train it."""

    family: str
    kind: Kind
    rank: int = 128
    steps: int = 7
    within_gib: float | None = None  # of GPU memory; as on a smaller card
    profile: bool = False  # two more steps, under torch's profiler
    memory_trace: bool = False  # one more step, with every allocation remembered
    small: bool = False
    compile: Literal["auto", "on", "off"] = "auto"

    @property
    def name(self) -> str:
        return f"{self.family}/{self.kind}"

    @property
    def settling(self) -> int:
        """First steps that compile and allocate, and are not counted."""
        return 2 if self.steps > 5 else 1

    @property
    def bucket(self) -> Resolution:
        return SMALL_BUCKET if self.small else BY_NAME[self.family].native

    @property
    def shape(self) -> Mapping[str, Any]:
        return SMALL if self.small else {}


ROWS: tuple[Row, ...] = (
    Row("5b", "low", profile=True, memory_trace=True),
    Row("5b", "fast", profile=True),
    Row("5b", "reference"),
    Row("5b", "auto", within_gib=22, memory_trace=True),
    Row("2b", "fast"),
    Row("2b", "reference"),
    Row("2b", "low"),
    Row("1.5-5b", "low", steps=4, memory_trace=True),
    Row("1.5-5b", "fast", steps=4),
    Row("1.5-5b", "reference", steps=3),
    Row("5b-i2v", "auto"),
    Row("5b", "numerics", steps=1),
    Row("2b", "auto"),
    Row("1.5-5b", "auto", steps=4, within_gib=32),
)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table; times relative to the reference's of the same family."""
    results = [result for result in results if "s_per_step" in result]
    against = {result["family"]: result["s_per_step"] for result in results if result["kind"] == "reference"}
    lines = [
        "| LoRA | s/step | times the reference | peak GiB | host GiB | forward / backward / optimizer s | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        reference = against.get(result["family"])
        ratio = f"{reference / result['s_per_step']:.2f}" if reference else ""
        parts = " / ".join(f"{result[part]:.2f}" for part in ("forward_s", "backward_s", "optimizer_s"))
        host = f"{result['locked_gib']:.1f}" if "locked_gib" in result else ""
        lines.append(
            f"| {_named(result)} | {result['s_per_step']:.2f} "
            f"| {ratio} | {max(result['peak_gib'], result.get('first_peak_gib', 0)):.1f} "
            f"| {host} | {parts} | {result['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def _named(result: Mapping[str, Any]) -> str:
    name = f"{result['family']} r{result['rank']} {result['bucket']}, {result['kind']}"
    if result["within_gib"]:
        name += f" within {result['within_gib']:g} GiB"
    return name + (", not compiled" if result["compile"] == "off" and result["kind"] != "reference" else "")
