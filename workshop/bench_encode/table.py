"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(results: Sequence[dict[str, Any]]) -> str:
    """Every kind of result that is there, in Markdown."""
    lines: list[str] = []
    for result in results:
        if "machine" in result:
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            lines += [f"{result['machine']}; {versions}; `{result['command']}`", ""]
    lines += _vae([result for result in results if "vae" in result])
    lines += _pipeline(
        next((result["encode"] for result in results if "encode" in result), None),
        next((result for result in results if "serial" in result), None),
    )
    for result in results:
        if "profile_of" in result:
            lines += ["", f"GPU kernels of one clip, {result['profile_of']}:", "", "| kernel | ms |", "|---|---|"]
            lines += [f"| `{kernel}` | {ms} |" for kernel, ms in result["ms_by_kernel"].items()]
    return "\n".join(lines) + "\n"


def _vae(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| VAE encode | size | s/clip | first | peak GiB | off fp32 |", "|---|---|---|---|---|---|"]
    for row in rows:
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        off = row.get("error", row.get("from_diffusers"))
        error = ("" if off is None else f"{off:.2%}") + (" off diffusers" if "from_diffusers" in row else "")
        lines.append(f"| {row['vae']} | {row['size']} | {row['s']:.3f} | {row['first_s']:.1f} | {peak} | {error} |")
    return [*lines, ""]


def _pipeline(report: dict[str, Any] | None, serial: dict[str, Any] | None) -> list[str]:
    lines = ["| whole pipeline | clips/min | |", "|---|---|---|"]
    if report is not None:
        seconds = report["seconds"]
        work_s = seconds["text"] + seconds["encode"]
        busy = "no GPU" if report["gpu_busy"] is None else f"GPU busy {report['gpu_busy']:.1%}"
        lines.append(
            f"| cogprep encode, T5 and VAE, models loaded | {60 * report['encoded'] / work_s:.1f} | "
            f"{report['encoded']} clips, {busy}, encoder {report['vae_encoder']}, bound by {report['bound_by']} |"
        )
        lines.append(
            f"| cogprep encode, from start to end | {60 * report['encoded'] / seconds['total']:.1f} | "
            + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            + " |"
        )
    if serial is not None:
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in serial["s_a_clip"].items())
        lines.append(
            f"| serial loop: decode, tiled VAE, T5; models loaded | {serial['clips_per_minute']:.1f} | {parts} |"
        )
    if report is not None and serial is not None:
        ratio = 60 * report["encoded"] / work_s / serial["clips_per_minute"]
        lines.append(f"| ratio | {ratio:.1f} | |")
    return lines if len(lines) > 2 else []
