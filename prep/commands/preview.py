"""`cogprep preview OUT`: what was encoded, to be looked at.

For a few samples from all over the folder: the source frame with what was cut,
the pixels that went into the VAE, and what the VAE makes of the stored latent.
The source side is made again from the data root, by the same code as encode.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cogcommon.cli.names import json_text, quoted
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import ModelError, SettingError, ShardError
from cogcommon.files.failures import check_writable
from cogcommon.files.ownership import check_own_folder, refuse_data_root, take_output
from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.device import default_precision, dtype_of, pick_device
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import (
    IMAGE_CLEAN_MEAN,
    IMAGE_MEAN,
    LATENT_MEAN,
    SampleRow,
    read_record,
    tar_name,
)
from cogcommon.store.address import as_shown

from ..plan.folder import Split, read_contract, records_in, shard_label, split_folder
from ..plan.moved import named_now
from ..plan.origin import read_origin
from ..processes.pool import Pool
from ..settings.shards import PreviewSettings
from ..show.preview_page import Preview, PreviewSample, html_of
from ..show.preview_sheet import draw_sheets
from ..show.source_view import view_source
from ..source.clip import ClipFault
from ..store.committed import read_tensors
from ..store.locks import shard_disk_errors
from ..store.outlet import is_address
from ..store.proof import A_PREVIEW, PREVIEW, preview_record
from ..video.colour import Pixels
from ..video.cut import Cut

T = TypeVar("T")

# On two cores the built-in VAE decodes 9 frames of 480x720 in 12 s, and CogVideoX's own in minutes.
_CPU_PIXELS = 256 * 384
_SAMPLES, _FEW = 8, 3


def run(settings: PreviewSettings) -> None:
    """The command: make the pages and say where they are."""
    if is_address(settings.out):
        raise SettingError(
            "a preview is drawn from shards of this machine",
            where=as_shown(settings.out),
            fix="copy the folder to this machine first, and name the copy",
        )
    folder, option = (settings.to, "--to") if settings.to else (settings.out / PREVIEW, "OUT/preview, or --to")
    refuse_data_root(settings.out, "OUT")
    refuse_data_root(folder, option)
    if (earlier := preview_record(folder)) is not None:
        earlier.write()
    check_own_folder(folder, A_PREVIEW, option)
    check_writable(folder)  # before minutes of decoding
    preview = make_preview(settings)
    with shard_disk_errors(folder), stage("drawing the page"):
        made = take_output(folder, A_PREVIEW, option)
        before = set(made.files)
        page = made.commit_bytes("index.html", html_of(preview))
        sheets = [made.commit_bytes(f"sheet-{number}.png", data) for number, data in enumerate(draw_sheets(preview))]
        made.forget(*before - {page.name, *(sheet.name for sheet in sheets)})  # of an earlier preview with more samples
    if settings.json:
        print(json_text(_told(preview, page, sheets)))
        return
    console = Console(soft_wrap=True)
    for shown in preview.shown:
        said = shown.source.reason if isinstance(shown.source, ClipFault) else f"PSNR {shown.psnr:.1f} dB"
        console.print(f"{shown.shard}  {shown.row.source}  {said}")
    console.print(f"\nopen {page}", style="bold")
    console.print("or   " + ", ".join(map(str, sheets)))


def _told(preview: Preview, page: Path, sheets: Sequence[Path]) -> dict[str, Any]:
    samples = [
        {
            "key": shown.row.key,
            "shard": shown.shard,
            "source": shown.row.source,
            "psnr": shown.psnr,
            "reason": shown.source.reason if isinstance(shown.source, ClipFault) else "",
        }
        for shown in preview.shown
    ]
    return {"page": str(page), "sheets": [str(sheet) for sheet in sheets], "samples": samples}


def make_preview(settings: PreviewSettings) -> Preview:
    """Choose samples, decode the beginnings of their latents, make their source side again.

    Raises:
        ShardError: the folder holds no samples, or a damaged one.
        ModelError: the VAE that encoded it cannot be had.
    """
    out = settings.out
    contract = read_contract(out)
    records = [] if contract is None else list(records_in(out))
    chosen = choose_samples(records, settings.samples or _SAMPLES)
    if contract is None or not chosen:
        raise ShardError(
            "nothing has been encoded there", where=str(out), fix="`cogprep encode`, or name another folder"
        )
    settings.check_frames((contract.family_row,))
    cut = Cut.of(contract)
    origin = read_origin(out)
    roots = Path(origin.data_root) if origin else Path()
    latents = Decoder(out, settings.model, contract)
    if settings.samples is None and any(latents.frugal(Resolution.parse(row.bucket)) for *_, row in chosen):
        chosen = choose_samples(records, _FEW)
    if origin:
        rows = named_now(origin, contract.task, [row for *_, row in chosen])
        chosen = [(split, number, row) for (split, number, _), row in zip(chosen, rows, strict=True)]
    shown = []
    with Pool(1) as pool, stage("decoding", len(chosen), "sample") as bar:
        sources = pool.run(
            view_source,
            (
                (roots / row.source, row.source_sha256, Resolution.parse(row.bucket), cut, contract.family_row.fps,
                 row.key, settings.frames)
                for _, _, row in chosen
            ),
        )  # fmt: skip
        for (split, number, row), source in zip(chosen, sources, strict=True):
            tensors = read_tensors(split_folder(out, split) / tar_name(number), row)
            decoded = latents.frames(tensors[LATENT_MEAN], settings.frames)
            images = []
            if IMAGE_CLEAN_MEAN in tensors:
                images.append(("clean", latents.frames(tensors[IMAGE_CLEAN_MEAN], 1)[0]))
                images.append(("noised", latents.frames(tensors[IMAGE_MEAN][0], 1)[0]))
            score = None if isinstance(source, ClipFault) else psnr(source.frames_FHWC[: len(decoded)], decoded)
            shown.append(PreviewSample(shard_label(split, number), row, source, decoded, images, score))
            bar.advance()
    return Preview(out, contract, len(records), shown)


def choose_samples(records: Sequence[tuple[Split, int, Path]], count: int) -> list[tuple[Split, int, SampleRow]]:
    """Up to ``count`` samples, evenly from all over the folder. Opens at most ``count`` records."""
    places: list[tuple[Split, int, SampleRow]] = []
    for split, number, path in _evenly(records, count):
        places += [(split, number, row) for row in read_record(path).rows if row.status == "ok"]
    return _evenly(places, count)


def _evenly(things: Sequence[T], count: int) -> list[T]:
    """From the first to the last."""
    count = min(count, len(things))
    return [things[index * (len(things) - 1) // max(1, count - 1)] for index in range(count)]


class Decoder:
    """The VAE of a folder's contract, decoding the beginnings of latents.

    Raises:
        ModelError: it cannot be had, or is another one than encoded the folder.
    """

    def __init__(self, out: Path, model: str | None, contract: Contract) -> None:
        self._device = pick_device()
        quiet_libraries()
        checkpoint = open_checkpoint(
            model or contract.model,
            None if model else contract.revision,
            named_by=None if model else f"the contract of {out}",
        )
        vae = checkpoint.identity("vae")
        theirs = contract.vae
        if (vae.config_sha256, vae.weights_sha256) != (theirs.config_sha256, theirs.weights_sha256):
            raise ModelError(
                f"the VAE of {checkpoint.name} is not the one that encoded this folder",
                where=f"weights {vae.weights_sha256[:12]} here, {theirs.weights_sha256[:12]} in the contract",
                fix=f"give the checkpoint that `cogprep encode` used: --model {quoted(contract.model)}",
            )
        self._family = checkpoint.family
        self._dtype = dtype_of(default_precision(checkpoint.family, self._device))
        self._vae = checkpoint.load_vae(self._dtype).to(self._device)

    def frugal(self, bucket: Resolution) -> bool:
        """Whether decoding takes long here: large pictures on a CPU."""
        return self._device.type == "cpu" and bucket.height * bucket.width > _CPU_PIXELS

    def frames(self, latent_CFHW: Any, count: int) -> Pixels:
        """Decode the first ``count`` frames (9, 17, ...) of an unscaled latent; or an image latent's one.

        The VAE is causal and decodes latent frames in twos, the first time three (for the odd number that
        a clip has), so an odd number of leading latent frames gives the very frames of the whole. One alone
        would not: its norms span the first three.

        Returns:
            (count, H, W, 3) uint8 RGB.
        """
        import torch

        latent_frames = min(latent_CFHW.shape[1], self._family.latent_frames(count))
        part = latent_CFHW[None, :, :latent_frames].to(self._device, self._dtype)
        with torch.inference_mode():
            pixels_CFHW = self._vae.decode(part).sample[0].float()
        scaled = ((pixels_CFHW / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        frames: Pixels = scaled.permute(1, 2, 3, 0).cpu().numpy()
        return frames


def psnr(ours: Pixels, theirs: Pixels) -> float:
    """Peak signal-to-noise ratio in dB; 99 for equal pixels."""
    error = np.square(ours.astype(np.float32) - theirs).mean()
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-9))))
