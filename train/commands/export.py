"""`cogtrain export`: the weights of a run, or of one of its checkpoints, in the form that others load.

What is written is loaded back by the library it is for, and one forward pass
is compared, before anything is said to be done. All of it on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import stage
from cogcommon.cli.terminal import Console
from cogcommon.errors import ModelError, RunError, SettingError
from cogcommon.files.atomic import commit, commit_bytes, temporary_beside
from cogcommon.files.failures import check_writable, disk_errors
from cogcommon.files.ownership import RECORD_FILE, check_own_folder, is_file, record_of, refuse_data_root, take_output
from cogcommon.libraries import quiet_libraries
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import dtype_of, pick_device

from ..model import lora, sft
from ..model.compare import check_answer, output_on_noise
from ..model.lora_file import FILE, PEFT_CONFIG, PEFT_FILE, read_facts
from ..model.method import Exported, method_of, of_checkpoint
from ..report.card import Kind, write_card
from ..report.published import published_model
from ..runs import checkpoint as checkpoints
from ..runs.folder import CARD_FILE, RecordedRun, open_base, read_run, trained_settings
from ..runs.mirror.restore import local_run
from ..settings.results import ExportSettings
from ..trainer.announce import checked

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

_EXPORT = "an export"  # what made the files of a folder


def run(settings: ExportSettings) -> None:
    """Export, compare, say where it is.

    Raises:
        RunError: no such run or checkpoint, or what was written is not what was trained.
    """
    folder = local_run(settings.run)
    if folder is None:
        raise SettingError(
            "no run was named", where="--run", fix="--run with the folder of a run, or a checkpoint-N in it"
        )
    run_folder, kept = checkpoints.run_and_checkpoint(folder)
    is_checkpoint, run = kept is not None, read_run(run_folder)
    if settings.to in ("peft", "comfyui") and run.facts.method == "sft":
        raise SettingError(
            "full fine-tuning has no adapter: all weights have changed",
            where=f"--to {settings.to}, {run.folder}",
            fix="--to diffusers",
        )
    out = settings.out or folder / "exported" / settings.to
    import torch

    pick_device()
    quiet_libraries()
    step = checkpoints.find_checkpoint(folder).state.step if is_checkpoint else run.exported
    model = open_base(settings.model, run.facts.model, run.facts.revision, run.folder, run.facts.family)
    stored = dtype_of(settings.precision or run.facts.precision)  # type: ignore[arg-type]
    # A CPU computes slowly in fp16, if at all; 2B, the only family with it, is 6.8 GB in fp32.
    compute = torch.float32 if stored == torch.float16 else stored
    asked = json.dumps([settings.to, step, run.facts.shards_fingerprint, model.name, str(stored)])
    check_writable(out)
    refuse_data_root(out, "--out")
    _adopt(out, run, step, asked)
    before = check_own_folder(out, _EXPORT, "--out")
    if before and before.request != asked:
        raise SettingError(
            "this folder holds another export: of another step, run or form",
            where=f"--out {out}",
            fix=f"--out {out}-{step}, or another new folder",
        )
    transformer = _trained(folder, run, model, compute, is_checkpoint)
    kind: Kind
    with disk_errors(out):
        made = take_output(out, _EXPORT, "--out", asked)
        files = _files(settings.to, run, step)
        made.open(*files)
        if run.facts.method == "sft" or settings.to == "merged":
            kind, exported = "transformer", _as_transformer(transformer, model, out, stored)
        elif settings.to == "peft":
            kind, exported = "peft", _as_peft(transformer, model, out, compute, run, step)
        else:
            kind = "comfyui" if settings.to == "comfyui" else "lora"
            exported = _as_lora(transformer, model, out / files[0], compute, run, step)
            for name in files[1:]:
                _also_as(exported.path, name)
        made.close(*files)
        card = write_card(out, run, kind, step)
    if settings.json:
        print(json_text({"path": str(exported.path), "kind": kind, "step": step, "difference": exported.difference}))
        return
    console = Console(soft_wrap=True)
    also = "".join(f", also as {name}" for name in files[1:] if kind == "lora")
    console.print(f"wrote {exported.path}{also}, step {step}")
    console.print(checked(exported))
    if card is None:
        console.print(f"{out / CARD_FILE} was changed by somebody, and stays as it is")


def _files(to: str, run: RecordedRun, step: int) -> tuple[str, ...]:
    """What an export writes beside its card. A LoRA has its own name, too: people keep those of many runs together.

    There is no dot in it: kijai's wrapper and others cut a name at the first one.
    """
    own = f"{run.folder.absolute().name.replace('.', '-')}-{step}"
    if run.facts.method == "sft" or to == "merged":
        return ()  # a folder, which has a record of its own
    lora_files = (FILE, f"{own}.safetensors")
    return {"comfyui": (f"{own}-comfyui.safetensors",), "peft": (PEFT_FILE, PEFT_CONFIG)}.get(to, lora_files)


def _also_as(file: Path, name: str) -> None:
    """Give a file a second name beside it; a copy where the file system has no links."""
    temporary = temporary_beside(file.with_name(name))
    try:
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
        commit(temporary, file.with_name(name))
    finally:
        temporary.unlink(missing_ok=True)


def _adopt(out: Path, run: RecordedRun, step: int, asked: str) -> None:
    """Write the record of an export that is older than records: of a LoRA file that says it is of this run."""
    file = out / FILE
    if os.path.lexists(out / RECORD_FILE) or not is_file(file):
        return
    try:
        facts = read_facts(file)
    except ModelError:
        return
    if facts.get("shards") == run.facts.shards_fingerprint and facts.get("base_model") == run.facts.model:
        request = asked if facts.get("steps") == str(step) else ""
        record_of(out, _EXPORT, lambda name: name == FILE, request).write()


@stage("loading the transformer")
def _trained(
    folder: Path, run: RecordedRun, model: Checkpoint, dtype: torch.dtype, is_checkpoint: bool
) -> CogVideoXTransformer3DModel:
    """The transformer as it was trained, adapters attached."""
    full = run.facts.method == "sft"
    if not is_checkpoint and full and (folder / sft.FOLDER).is_dir():
        return sft.load(folder / sft.FOLDER, model, dtype)
    if not is_checkpoint and not full and (folder / FILE).is_file():
        transformer = model.load_transformer(dtype)
        lora.load(folder / FILE, model, transformer)
        return transformer
    if not is_checkpoint:
        latest = checkpoints.list_checkpoints(folder)
        raise RunError(
            "the run has not finished, and has no exported weights",
            where=str(folder),
            fix=f"--run {latest[-1]}" if latest else "it has no checkpoint either: let it run on",
        )
    return of_checkpoint(method_of(trained_settings(run.folder, run.facts.method)), model, folder, dtype)


@stage("writing and proving the export")
def _as_lora(
    transformer: CogVideoXTransformer3DModel,
    model: Checkpoint,
    file: Path,
    dtype: torch.dtype,
    run: RecordedRun,
    step: int,
) -> Exported:
    """A LoRA file, with the names of diffusers or, under another name than diffusers looks for, of ComfyUI."""
    import torch

    expected = output_on_noise(transformer)
    state = lora.state_dict(transformer)
    facts = _facts(model, run, step)
    lora.save(state if file.name == FILE else lora.for_comfyui(state), file.parent, facts, file.name)
    return Exported(file, lora.check(file, model, state, expected, torch.device("cpu"), dtype))


def _facts(model: Checkpoint, run: RecordedRun, step: int) -> dict[str, str]:
    """What our own commands read of a LoRA: the base model as it is called here, among others."""
    return {
        "base_model": model.name,
        "revision": model.revision or "",
        "family": model.family.name,
        "steps": str(step),
        "shards": run.facts.shards_fingerprint,
        "contract": run.facts.contract_fingerprint,
    }


@stage("writing and proving the export")
def _as_transformer(
    transformer: CogVideoXTransformer3DModel, model: Checkpoint, out: Path, dtype: torch.dtype
) -> Exported:
    """Every weight, adapters merged in."""
    import torch

    expected = output_on_noise(transformer)
    lora.merge(transformer)
    state = sft.state_dict(transformer, dtype)
    folder = sft.save(state, model, out)
    return Exported(folder, sft.check(folder, model, state, expected, torch.device("cpu")))


@stage("writing and proving the export")
def _as_peft(
    transformer: CogVideoXTransformer3DModel,
    model: Checkpoint,
    out: Path,
    dtype: torch.dtype,
    run: RecordedRun,
    step: int,
) -> Exported:
    """A folder for ``PeftModel.from_pretrained``; the scale is folded, so its config says alpha = rank."""
    from peft import PeftModel
    from safetensors.torch import save as to_bytes

    expected = output_on_noise(transformer)
    state = lora.state_dict(transformer)
    config = transformer.peft_config["default"]
    ranks = {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name}
    assert len(ranks) == 1, ranks
    config.r = config.lora_alpha = ranks.pop()
    config.base_model_name_or_path = published_model(model.name, model.family.name)
    config.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    renamed = {f"base_model.model.{name.removeprefix('transformer.')}": tensor for name, tensor in state.items()}
    commit_bytes(out / PEFT_FILE, to_bytes(renamed, metadata=lora.metadata(_facts(model, run, step))))
    commit_bytes(out / PEFT_CONFIG, _json(config.to_dict()))

    loaded = PeftModel.from_pretrained(model.load_transformer(dtype), str(out)).get_base_model()
    wrong = lora.acting_otherwise(loaded, state)  # exact, where the forward pass of half precision is a gross check
    return Exported(out, check_answer(loaded, wrong, expected, dtype, what="PEFT folder", where=out))


def _json(values: Mapping[str, Any]) -> bytes:
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return json.dumps(plain, indent=1, sort_keys=True).encode()
