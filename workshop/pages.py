"""The tables of the READMEs, and the files of configs/, from the settings and the records: `make readme`."""

import dataclasses
import re
from pathlib import Path

from cogcommon.cli.settings import flag_of, shown_default
from cogcommon.jobs.settings import LaunchSettings
from cogprep.settings.encode import EncodeSettings
from cogprep.settings.lists import CaptionSettings
from cogtrain.settings.results import CompareSettings, ExportSettings, GenerateSettings
from cogtrain.settings.training import LoraSettings
from workshop.bench_train.hardware import beside_table, config_files, guide_table, link_table, measured_table
from workshop.verdicts import card_table, eight_table, verdict_table

ROOT = Path(__file__).parents[1]
README, PREP, TRAIN, HARDWARE = (
    ROOT / name for name in ("README.md", "prep/README.md", "train/README.md", "configs/README.md")
)
TRANSLATED = (ROOT / "README.zh.md", ROOT / "README.ja.md")
PAGES = (README, *TRANSLATED, PREP, TRAIN, HARDWARE)


def table(cls: type) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        help = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{flag_of(field)}` | {shown_default(field)} | {help} |")
    return "\n".join(rows)


def tables_of(page: Path) -> dict[str, str]:
    """The tables of a page by the mark before each."""
    if page == PREP:
        by_command = {"encode": EncodeSettings, "caption": CaptionSettings}
        return {f"options of cogprep {name}": table(cls) for name, cls in by_command.items()}
    if page == TRAIN:
        by_command = {
            "lora": LoraSettings, "generate": GenerateSettings, "compare": CompareSettings, "export": ExportSettings,
            "launch": LaunchSettings,
        }  # fmt: skip
        options = {f"options of cogtrain {name}": table(cls) for name, cls in by_command.items()}
        return {"eight GPUs": eight_table(), **options}
    if page == HARDWARE:
        return {
            "hardware table": guide_table(), "beside a plain loop": beside_table(), "what fits": verdict_table(),
            "runs measured": measured_table(), "slower links": link_table(),
        }  # fmt: skip
    return {"which card": card_table()}


def with_tables(page: Path) -> str:
    """The text of a page, each table after its mark made anew."""
    text = page.read_text(encoding="utf-8")
    for name, rows in tables_of(page).items():
        mark = f"<!-- {name} -->"
        made = f"{mark}\n{rows}\n".replace("\\", r"\\")
        text, count = re.subn(rf"{mark}\n(?:\|.*\n)*", made, text)
        assert count == 1, f"{page} has {count} places for: {name}"
    return text


if __name__ == "__main__":
    for file, text in config_files().items():
        (ROOT / file).write_text(text, encoding="utf-8")
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
