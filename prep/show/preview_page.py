"""The page of a preview: one HTML file with everything in it, pictures too."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cogcommon.cli.names import plain
from cogcommon.model.families import BUILTIN_NAMES
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import SampleRow

from ..source.clip import ClipFault
from ..video.colour import Pixels
from .preview_loop import loop_of
from .source_view import SourceView

COLUMNS = 4  # frames of a sample that are shown
BOX = (255, 176, 32)  # the crop box
IMAGES = "first frame, decoded"  # heading of I2V's image latents
_HEIGHT = 360  # of an embedded picture, pixels
_QUALITY = 88


@dataclass(frozen=True)
class PreviewSample:
    """One sample, ready to be drawn. Pixels are uint8 RGB of the bucket's size."""

    shard: str
    row: SampleRow
    source: SourceView | ClipFault
    decoded_FHWC: Pixels  # of the first latent frames
    images: Sequence[tuple[str, Pixels]]  # I2V: what the image latents decode to
    psnr: float | None  # over the decoded frames; None without a source


@dataclass(frozen=True)
class Preview:
    """What the pages show."""

    out: Path
    contract: Contract
    shards: int  # in the folder
    shown: Sequence[PreviewSample]


def shown_frames(shown: PreviewSample) -> list[int]:
    """Which of the decoded frames are shown: from the first to the last. I2V's images take a column."""
    count = len(shown.decoded_FHWC)
    most = COLUMNS - bool(shown.images)
    return sorted({round(place) for place in np.linspace(0, count - 1, min(most, count))})


def time_of(shown: PreviewSample, index: int) -> str:
    """When a frame is shown, from the clip's first used frame."""
    return f"{index / shown.row.effective_fps:.2f} s"


def sample_facts(shown: PreviewSample) -> list[tuple[str, str]]:
    """What a sample is, as name and value."""
    row = shown.row
    told = [
        ("clip", f"{row.source} (line {row.source_line})"),
        ("shard", shown.shard),
        ("bucket", row.bucket),
        (
            "frames",
            f"{len(row.frames)}, from {row.frames[0]} to {row.frames[-1]} of the clip, {row.effective_fps:.3g} fps"
            if row.frames[1:]
            else "a picture",
        ),
    ]
    if isinstance(shown.source, SourceView):
        left, top, right, bottom = shown.source.box
        size = shown.source.width * shown.source.height
        told.append(("source", f"{shown.source.width}x{shown.source.height}"))
        told.append(("cut away", f"{1 - (right - left) * (bottom - top) / size:.0%}"))
    # Shards keep the old words: a clip of 360x640 is read as HD is, by its height, and is not HD.
    colour = row.colour.replace("untagged HD", "untagged, read as HD").replace("untagged SD", "untagged, read as SD")
    told += [("colour", colour), ("tokens", f"{row.caption_tokens}{' (cut)' if row.caption_truncated else ''}")]
    return told


def with_box(source: SourceView, most: tuple[int, int]) -> Image.Image:
    """The whole source frame, scaled to fit ``most``: what is cut away in the dark, the rest in a box."""
    scale = min(most[0] / source.width, most[1] / source.height)
    size = max(1, round(source.width * scale)), max(1, round(source.height * scale))
    whole = Image.fromarray(source.whole_HWC).resize(size, Image.Resampling.LANCZOS)
    left, top, right, bottom = (round(edge * scale) for edge in source.box)
    framed = whole.point(lambda level: level * 0.3)
    framed.paste(whole.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(framed).rectangle((left, top, right - 1, bottom - 1), outline=BOX, width=3)
    return framed


def grade(psnr: float) -> str:
    """How near the decoded picture is to its source."""
    return "good" if psnr >= 28 else "fair" if psnr >= 20 else "poor"


def summary(preview: Preview) -> str:
    """What the page shows, in a line."""
    contract = preview.contract
    scores = [shown.psnr for shown in preview.shown if shown.psnr is not None]
    mean = f"; mean PSNR {np.mean(scores):.1f} dB" if scores else ""
    shards = "1 shard" if preview.shards == 1 else f"{preview.shards} shards"
    samples = f"{len(preview.shown)} sample{'s' if len(preview.shown) > 1 else ''} from {shards}"
    toy = " (its small VAE smears what moves)" if contract.model in BUILTIN_NAMES else ""
    return f"{samples}; {contract.model} ({contract.task}), stored as {contract.dtype}{mean}{toy}"


def html_of(preview: Preview) -> bytes:
    """The page."""
    body = "\n".join(_card(shown) for shown in preview.shown)
    title = html.escape(str(preview.out))
    return plain(_PAGE.format(title=title, summary=html.escape(summary(preview)), body=body)).encode()


def is_page(path: Path) -> bool:
    """Whether a file is the page of a preview, by its beginning and its end."""
    begin, _, rest = _PAGE.partition("{title}")
    try:
        page = path.read_bytes()
    except OSError:
        return False
    return page.startswith(begin.encode()) and page.endswith(rest.rpartition("}")[2].encode())


def _card(shown: PreviewSample) -> str:
    shown_columns = shown_frames(shown)
    source = shown.source
    rows: list[tuple[str, list[str]]] = []  # a name, and cells
    sides = [shown.decoded_FHWC] if isinstance(source, ClipFault) else [source.frames_FHWC, shown.decoded_FHWC]
    if isinstance(source, ClipFault):
        whole = f'<div class="gone">{html.escape(source.reason)}</div>'
    else:
        whole = _figure(with_box(source, (640, 640)), "source: the box is what was encoded")
        rows.append(("encoded", [_cell(source.frames_FHWC[index]) for index in shown_columns]))
    rows.append(("decoded", [_cell(shown.decoded_FHWC[index]) for index in shown_columns]))
    head = "".join(f"<th>{time_of(shown, index)}</th>" for index in shown_columns)
    if shown.images:
        head += f"<th>{IMAGES}</th>"
        rows += [("", ["<td></td>"] * len(shown_columns)) for _ in shown.images[len(rows) :]]
        for (_, cells), (name, picture_HWC) in zip(rows, shown.images, strict=False):
            cells.append(_cell(picture_HWC, name))
    strip = "".join(f"<tr><th>{name}</th>{''.join(cells)}</tr>" for name, cells in rows)
    score = "" if shown.psnr is None else (f'<span class="psnr {grade(shown.psnr)}">PSNR {shown.psnr:.1f} dB</span>')
    told = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in sample_facts(shown))
    return f"""<article>
<header><p>{html.escape(shown.row.caption)}</p>{score}</header>
<div class="sides">
<div class="whole">{whole}</div>
<div class="clips">{_loop(sides, shown.row)}<table><tr><th></th>{head}</tr>{strip}</table></div>
</div>
<dl>{told}</dl>
</article>"""


def _loop(sides: list[Pixels], row: SampleRow) -> str:
    """The clips beside each other, still until they are played; nothing of pictures."""
    if len(sides[-1]) < 2:
        return ""
    data = base64.b64encode(loop_of(sides, row.effective_fps)).decode()
    label = " | ".join(["encoded", "decoded"][-len(sides) :])
    shown, encoded = len(sides[-1]), len(row.frames)
    count = f"the first {shown} of {encoded} frames" if shown < encoded else f"{encoded} frames"
    facts = f"{label}, {count} at {row.effective_fps:.3g} fps"
    return f"""<figure class="loop">
<video src="data:video/mp4;base64,{data}" aria-label="{label}" loop muted playsinline></video>
<figcaption><button type="button">play</button> {facts}</figcaption>
</figure>"""


def _cell(picture_HWC: Pixels, name: str = "") -> str:
    return f"<td>{_picture(Image.fromarray(picture_HWC))}{name and f'<small>{name}</small>'}</td>"


def _figure(image: Image.Image, caption: str) -> str:
    return f"<figure>{_picture(image)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _picture(image: Image.Image) -> str:
    if image.height > _HEIGHT:
        image = image.resize((max(1, image.width * _HEIGHT // image.height), _HEIGHT), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=_QUALITY, subsampling=0)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>cogprep preview: {title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #767676; --card: #8881; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; margin: 0; }}
h1 + p {{ color: var(--soft); margin: .2rem 0 2rem; }}
article {{ border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; margin: 0 0 1.5rem; }}
header {{ display: flex; gap: 1.5rem; align-items: baseline; justify-content: space-between; }}
header p {{ margin: 0 0 .8rem; max-width: 75ch; }}
.psnr {{ white-space: nowrap; font-weight: 600; padding: .1rem .6rem; border-radius: 99px; color: #fff; }}
.good {{ background: #2e7d32; }} .fair {{ background: #b26a00; }} .poor {{ background: #b3261e; }}
.sides {{ display: flex; gap: 1.2rem; align-items: flex-start; }}
.whole {{ flex: 0 0 30%; }} .whole img {{ max-height: 30rem; width: auto; max-width: 100%; }}
figure {{ margin: 0 0 .6rem; }} figcaption, th {{ color: var(--soft); font-weight: 400; font-size: .8rem; }}
.gone {{ border: 1px dashed var(--line); border-radius: 6px; padding: 3rem 1rem; text-align: center; }}
.gone {{ color: var(--soft); }}
.clips {{ flex: 1; min-width: 0; }} video {{ width: 100%; max-height: 26rem; display: block; border-radius: 4px; }}
.loop figcaption {{ margin-top: .3rem; }}
button {{ font: inherit; padding: 0 .8rem; border-radius: 99px; cursor: pointer; min-width: 4.5rem; }}
button {{ border: 1px solid var(--line); background: var(--card); color: inherit; }}
table {{ border-collapse: collapse; table-layout: fixed; width: 100%; }}
td, th {{ padding: 0 .2rem .3rem; }} tr > th:first-child {{ width: 4.5rem; text-align: right; }}
td {{ position: relative; }}
td small {{ position: absolute; left: .2rem; bottom: .3rem; padding: 0 .4rem; background: #1c1c1e; color: #fafaf8; }}
img {{ width: 100%; display: block; border-radius: 4px; }}
dl {{ display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .6rem 0 0; font-size: .82rem; }}
dl div {{ display: flex; gap: .4rem; }} dt {{ color: var(--soft); }} dd {{ margin: 0; }}
@media (max-width: 800px) {{
  body {{ margin: 1rem auto; padding: 0 .6rem; }} article {{ padding: .8rem; }} h1 {{ overflow-wrap: anywhere; }}
  .sides, header {{ flex-direction: column; align-items: stretch; gap: .4rem; }}
  header .psnr {{ align-self: start; margin-bottom: .5rem; }}
  td, th {{ padding: 0 .1rem .2rem; }} dd {{ overflow-wrap: anywhere; }}
  tr > th:first-child {{ width: 1.2rem; writing-mode: sideways-lr; text-align: center; }}
}}
</style>
<script>
addEventListener("DOMContentLoaded", () => {{
  for (const loop of document.querySelectorAll(".loop")) {{  // still until played; controls where there is a mouse
    const video = loop.querySelector("video"), button = loop.querySelector("button");
    const turn = () => video.paused ? video.play() : video.pause();
    button.onclick = turn;
    video.onclick = () => video.controls || turn();
    video.onplay = video.onpause = () => button.textContent = video.paused ? "play" : "pause";
    video.onpointerenter = event => video.controls = event.pointerType === "mouse";
    video.onpointerleave = () => video.controls = false;
  }}
}});
</script>
<h1>{title}</h1><p>{summary}</p>
{body}
</html>
"""
