"""`cogprep encode`: from a folder of clips and captions to committed shards, on every GPU that is ours to use."""

from __future__ import annotations

import os
import sys

from cogcommon.cli.progress import say
from cogcommon.cli.terminal import Console
from cogcommon.errors import AGAIN, DataRootError, SettingError
from cogcommon.model.device import (
    visible_gpus,
)
from cogcommon.store.address import as_shown

from ..dataset.lists import check_root
from ..encode.gpus import encode_in_parts, gpu_count
from ..encode.part import check_and_hash, encode_slice
from ..encode.report import Report, show
from ..engines.table import ENGINES
from ..plan.slice import POD, choose_slice
from ..settings.encode import EncodeSettings
from ..store.outlet import is_address
from ..store.proof import check_shards_output


def run(settings: EncodeSettings) -> None:
    """The command: encode, report, and say how it went.

    Raises:
        CogError: as `encode`; none of the clips can be used; with --strict, some cannot.
        SystemExit: with `AGAIN`, where shards of this run's were left to another process.
    """
    try:
        report = encode(settings)
    except KeyboardInterrupt:
        kept = f"finished clips are kept in {as_shown(settings.out)}: run the same command again to go on"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None
    path = as_shown(report.write(settings.out))
    if settings.json:
        print(report.to_json())
    else:
        show(report, Console(), path)
    if not report.usable:
        raise DataRootError(
            "none of the clips can be used", where=as_shown(settings.root), fix=f"see the reasons above, or in {path}"
        )
    if settings.strict and (trouble := report.trouble):
        raise DataRootError(trouble, where=path, fix="mend or remove these lines of the lists, or leave --strict out")
    # Not under torchrun, which at the first code but 0 stops the processes that still have work.
    if report.busy and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(AGAIN)


def encode(settings: EncodeSettings) -> Report:
    """Bring the output folder in line with the data root, on every GPU that is ours to use.

    Raises:
        CogError: as `encode_slice`.
        RunError: one of several processes failed.
    """
    part = choose_slice(settings.worker, os.environ)
    settings.keep_clips()
    check_root(settings.root, settings.prompts, settings.videos)  # before a model is looked for on the hub
    if not is_address(settings.out):  # else each process looks, where it has the folder's listing
        check_shards_output(settings.out, "--out", (settings.prompts, settings.videos))
    if part.count > 1:
        say(f"worker {part} ({part.source}): one in {part.count} of the planned shards")
    if settings.engine != "local":
        if is_address(settings.out):
            raise SettingError(
                "the nodes of a Ray cluster write to a folder that they share",
                where=f"--engine {settings.engine} --out {as_shown(settings.out)}",
                fix="--out with such a folder, copied to the address afterwards; or --worker i/n on each machine, "
                "which writes there",
            )
        with ENGINES[settings.engine](settings) as engine:
            return encode_slice(settings, engine)
    # Under a launcher there is one process a GPU already.
    parts = gpu_count(settings.gpus, visible_gpus()) if part.source in ("default", "--worker", POD) else 1
    if parts > 1:
        # A wrong setting or list is said once, not by every process.
        checkpoint = settings.open_model()
        settings.read_lists(checkpoint.family.task).trusted()
        check_and_hash(checkpoint)  # what is found out, all of them remember
        return encode_in_parts(settings, part, parts)
    return encode_slice(settings)
