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
    encodes = [result for result in results if "encode" in result]
    lines += _pipeline(
        [(result["encode"], result.get("ways", "")) for result in encodes],
        next((result for result in results if "serial" in result), None),
    )
    lines += _steps([result for result in results if "step" in result])
    for result in results:
        if "failed" in result:
            lines.append(f"failed: {result['failed']}: {result['why']}")
        if "skipped" in result:
            lines.append(f"no time was left for: {result['skipped']}")
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


def _steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "| alone | ms | |", "|---|---|---|"]
    return lines + [f"| {row['step']} | {row['ms']:.3f} | {row['rate']:.3g} {row['unit']} |" for row in rows]


def _pipeline(reports: Sequence[tuple[dict[str, Any], str]], serial: dict[str, Any] | None) -> list[str]:
    """Encodes, each with the ways that it was told to take, and the serial loop."""
    lines = ["| whole pipeline | clips/min | |", "|---|---|---|"]
    for report, ways in reports:
        seconds = report["seconds"]
        busy = "no GPU" if report["gpu_busy"] is None else f"GPU busy {report['gpu_busy']:.1%}"
        told = f" with `{ways}`" if ways else ""
        lines.append(
            f"| cogprep encode{told}, T5 and VAE, models loaded | {_clips_a_minute(report):.1f} | "
            f"{report['encoded']} clips, {busy}, encoder {report['vae_encoder']}, bound by {report['bound_by']} |"
        )
        lines.append(
            f"| cogprep encode{told}, from start to end | {60 * report['encoded'] / seconds['total']:.1f} | "
            + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            + " |"
        )
    if serial is not None:
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in serial["s_a_clip"].items())
        lines.append(
            f"| serial loop: decode, tiled VAE, T5; models loaded | {serial['clips_per_minute']:.1f} | {parts} |"
        )
    if reports and serial is not None:
        ratio = _clips_a_minute(reports[0][0]) / serial["clips_per_minute"]
        lines.append(f"| ratio | {ratio:.1f} | |")
    return lines if len(lines) > 2 else []


def _clips_a_minute(report: dict[str, Any]) -> float:
    """Without loading, checking and warm-up."""
    return float(60 * report["encoded"] / (report["seconds"]["text"] + report["seconds"]["encode"]))
