"""Reads LoRA files, ours and other people's, into one form: fp32, in diffusers' keys, the scale folded into B.

A LoRA adds ``scale * B A`` to a layer's weight, and the scale is alpha/rank. Where alpha stands, in the order in which
it counts:

1. a tensor ``<layer>.alpha`` beside each pair (kohya, ComfyUI);
2. the file's metadata: ``lora_adapter_metadata`` (diffusers 0.34 and later), ``lora_config`` (finetrainers),
   ``lora_alpha`` or ``transformer.lora_alpha`` (as ComfyUI reads it), ``ss_network_alpha`` (kohya);
3. ``adapter_config.json`` beside the file (PEFT), where the names are PEFT's.

A file of ours has it folded in. A file that has it nowhere acts with scale 1, as in diffusers and ComfyUI.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.names import command_line
from cogcommon.errors import ModelError
from cogcommon.files.typed import parse_object
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.tensor_file import open_tensors
from cogcommon.store.address import address_of, as_shown

from ..distributed.snapshot import EMA, STATE_FILE, WEIGHTS
from .lora_names import PREFIX, Form, spellings

if TYPE_CHECKING:
    import torch

FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTS = "cogtune"  # entry of our files' own metadata; other loaders pass over it

_CONFIGS = ("lora_adapter_metadata", "lora_config")  # entries that hold a configuration of PEFT's, as JSON
_OTHER_BASE = re.compile("pissa|olora|corda|loftq", re.IGNORECASE)  # ways to begin that change the base's weights
FOLDED = "folded in"  # where alpha stands in our files

_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<side>A|B|down|up)(?:\.\w+)?|lora(?:_linear_layer)?\.(?P<other>down|up))\.weight"
)
_ALPHA = ".alpha"
_HUB = re.compile(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)")  # how a repository of the hub is called
_ANOTHER = "give another file"
# What a file may hold that is no plain LoRA of the transformer, by what its names have in them.
_OTHERS = {
    r"dora_scale|lora_magnitude_vector": "it is a DoRA",
    r"hada_w|lokr_w": "it is a LoHa or LoKr of LyCORIS",
    r"\.matrix_[AB]\.": "it has SAT's names, which CogVideo's tools/export_sat_lora_weight.py converts",
    r"lora_te|text_encoder": "it also changes the text encoder, which we leave as it is",
    r"lora_mid|\.bias$|\.diff(_b)?$|\.(w|b)_norm$": "it changes more than linear layers' weights",
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that fits a transformer.

    Attributes:
        form: whose names it has.
        alpha: where its alpha stands, in words; empty: nowhere.
        rank: the largest of its layers'; the others are padded with zeros, so that all have it.
        state: as `lora.state_dict`: ``transformer.<layer>.lora_A.weight`` (rank, in), ``...lora_B.weight`` (out, rank).
    """

    path: Path
    form: Form
    alpha: str
    rank: int
    state: Mapping[str, torch.Tensor]

    def __str__(self) -> str:
        scale = f"alpha {self.alpha}" if self.alpha else "no alpha, so it acts with scale 1, as in diffusers"
        return f"{self.path}: rank {self.rank}, {self.form} names, {scale}"


def lora_in(path: Path) -> Path:
    """The LoRA file that a path names: itself, or one in a folder.

    Raises:
        ModelError: there is none, or the folder has several; it is an address, or a checkpoint of a run, which has
            alpha nowhere.
    """
    if address := address_of(path):
        raise ModelError(
            "a LoRA is read from this machine, not from an address", where=as_shown(address), fix="fetch the file first"
        )
    checkpoint = path.parent if path.name in (WEIGHTS, EMA) else path
    if (checkpoint / STATE_FILE).is_file():
        raise ModelError(
            "this is a checkpoint of a run: its weights are not yet a LoRA file's, which has alpha folded in",
            where=str(path),
            fix=f"{command_line('cogtrain', 'export', '--run', checkpoint)}, and give the file that it writes",
        )
    if not path.is_dir():
        if not path.is_file():
            hub = f"; what is on the hub you fetch first: {command_line('hf', 'download', path, '--local-dir', path)}"
            raise ModelError(
                "no such file",
                where=str(path),
                fix=f"a LoRA file, or a folder with its {FILE}" + hub * bool(_HUB.fullmatch(str(path))),
            )
        return path
    for name in (FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(
            f"this folder holds {len(files) or 'no'} .safetensors files", where=str(path), fix="name the LoRA file"
        )
    return files[0]


def digest_of(file: Path) -> str:
    """A hash of what decides what a LoRA file adds: its bytes, and a config beside it."""
    digest = hashlib.sha256(file.read_bytes())
    beside = file.with_name(PEFT_CONFIG)
    if beside.is_file():
        digest.update(beside.read_bytes())
    return digest.hexdigest()


def file_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        ModelError: no safetensors file.
    """
    with open_tensors(file) as opened:
        return dict(opened.metadata() or {})


def read_facts(file: Path) -> dict[str, str]:
    """What `lora.save` wrote beside the weights; of a file of another tool, what reads like it, or nothing.

    Raises:
        ModelError: no safetensors file.
    """
    try:
        facts = parse_object(file_metadata(file).get(FACTS, "{}"))
    except ValueError:
        return {}
    return {name: value for name, value in facts.items() if isinstance(value, str)}


def base_of(file: Path) -> tuple[str | None, str | None]:
    """The base model and its revision, as a LoRA file of ours or the config of PEFT beside it says; None: not said.

    Raises:
        ModelError: no safetensors file.
    """
    facts = read_facts(file)
    if facts.get("base_model"):
        return facts["base_model"], facts.get("revision")
    try:
        named = parse_object(file.with_name(PEFT_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None, None
    return (named if isinstance(named, str) and named else None), None


def read_lora(file: Path, checkpoint: Checkpoint, transformer: torch.nn.Module) -> LoraFile:
    """Read a LoRA file of whatever tool, for this transformer, which may be one without memory.

    Raises:
        ModelError: no plain LoRA, or one for another model; names the first layer that is missing or of another shape,
            or the family for which the file says it was trained.
    """
    import torch
    from safetensors.torch import load_file

    metadata = file_metadata(file)
    trained_for = read_facts(file).get("family", checkpoint.family.name)
    if trained_for != checkpoint.family.name:
        raise _misfit(file, checkpoint, f"it was trained for {trained_for}")
    linear = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    pairs, form = _pairs(load_file(file), spellings(linear), file, checkpoint)
    where, scales = _scales(pairs, form, metadata, file)
    rank = max(len(pair["A"]) for pair in pairs.values())
    state = {}
    for layer, pair in pairs.items():
        a, b, target = pair["A"], pair["B"], linear[layer]
        for there, here in ((a.shape[1], target.in_features), (b.shape[0], target.out_features)):
            if there != here:
                raise _misfit(file, checkpoint, f"{layer} is {here} wide in the model and {there} in the file")
        more = rank - len(a)
        if scales[layer] != 1:
            b = b * scales[layer]
        if more:
            a, b = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
        state[f"transformer.{layer}.lora_A.weight"] = a.contiguous()
        state[f"transformer.{layer}.lora_B.weight"] = b.contiguous()
    return LoraFile(file, form, where, rank, state)


def _pairs(
    tensors: Mapping[str, torch.Tensor], known: Mapping[str, tuple[str, Form]], file: Path, checkpoint: Checkpoint
) -> tuple[dict[str, dict[str, torch.Tensor]], Form]:
    """By layer the tensors A, B and perhaps alpha, in fp32; and whose names they have."""
    import torch

    names = {name: _split(name) for name in tensors}
    if not any(part and part[0] in known for part in names.values()):
        _refuse_others(tensors, file)
        odd = next(iter(tensors), "no tensor")
        raise ModelError(
            f"not a LoRA of a CogVideoX transformer ({odd})",
            where=str(file),
            fix=f"give the {FILE} of a run, or another LoRA of CogVideoX",
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, part in names.items():
        if part is None or part[0] not in known:
            _refuse_others([name], file)
            layer = part[0] if part else name
            raise _misfit(file, checkpoint, f"the model has no linear layer {layer.removeprefix('transformer.')}")
        layer, side = known[part[0]][0], part[1]
        tensor = tensors[name].to(torch.float32)
        if side in pairs.get(layer, {}):
            raise ModelError(f"it holds two LoRAs of {layer}", where=f"{file}: {name}", fix="give a file with one")
        if not tensor.isfinite().all():
            raise ModelError("the weights are not finite", where=f"{file}: {name}", fix=_ANOTHER)
        pairs.setdefault(layer, {})[side] = tensor
    form = next(known[part[0]][1] for part in names.values() if part and part[0] in known)
    for layer, pair in pairs.items():
        whole = "A" in pair and "B" in pair and pair["A"].ndim == pair["B"].ndim == 2
        if not whole or not 0 < len(pair["A"]) == pair["B"].shape[1]:
            raise ModelError(
                f"the tensors of {layer} are no pair (rank, in) and (out, rank)", where=str(file), fix=_ANOTHER
            )
    return pairs, form


def _split(name: str) -> tuple[str, str] | None:
    """A tensor's layer, as the file calls it, and what it is of it: A, B or alpha."""
    if name.endswith(_ALPHA):
        return name.removesuffix(_ALPHA), "alpha"
    if not (match := _TENSOR.fullmatch(name)):
        return None
    side = match["side"] or match["other"]
    return match["layer"], {"down": "A", "up": "B"}.get(side, side)


def _refuse_others(names: Iterable[str], file: Path) -> None:
    for name in names:
        for pattern, what in _OTHERS.items():
            if re.search(pattern, name):
                raise ModelError(
                    f"this is no plain LoRA of the transformer: {what} ({name})",
                    where=str(file),
                    fix="convert it to a LoRA of the transformer's linear layers, or use another",
                )


def _misfit(file: Path, checkpoint: Checkpoint, fault: str) -> ModelError:
    return ModelError(
        f"this LoRA is not for {checkpoint.name} ({checkpoint.family.name}): {fault}",
        where=str(file),
        fix="give the --model that it was trained on",
    )


def _scales(
    pairs: Mapping[str, Mapping[str, torch.Tensor]], form: Form, metadata: Mapping[str, str], file: Path
) -> tuple[str, dict[str, float]]:
    """Where alpha stands, in words, and each layer's scale."""
    ranks = {layer: len(pair["A"]) for layer, pair in pairs.items()}
    try:
        if any("alpha" in pair for pair in pairs.values()):
            where = "in its tensors"
            scales = {
                layer: float(pair["alpha"]) / ranks[layer] if "alpha" in pair else 1.0 for layer, pair in pairs.items()
            }
        elif FACTS in metadata:
            return FOLDED, dict.fromkeys(ranks, 1.0)
        else:
            where, config = _config(form, metadata, file)
            if _OTHER_BASE.match(str(config.get("init_lora_weights"))):
                raise ModelError(
                    f"it goes on another base than the model: its init_lora_weights is {config['init_lora_weights']}",
                    where=f"{file}, or {PEFT_CONFIG} beside it",
                    fix="let PEFT write a plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)",
                )
            scales = {layer: _scale(config, layer, rank) if config else 1.0 for layer, rank in ranks.items()}
        if not all(map(math.isfinite, scales.values())):
            raise ValueError("it is not finite")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise ModelError(
            f"what it says of its alpha cannot be read: {error}",
            where=f"{file}, or {PEFT_CONFIG} beside it",
            fix=_ANOTHER,
        ) from error
    return where, scales


def _config(form: Form, metadata: Mapping[str, str], file: Path) -> tuple[str, dict[str, Any]]:
    """What stands of alpha beside the tensors, as PEFT's `LoraConfig` has it; empty: nothing."""
    flat = {name: value for name, value in metadata.items() if name in ("lora_alpha", f"{PREFIX}lora_alpha")}
    for whole in (*(parse_object(metadata[entry]) for entry in _CONFIGS if entry in metadata), flat):
        config = {name.removeprefix(PREFIX): value for name, value in whole.items()}
        if "lora_alpha" in config:
            return "in its metadata", config
    if re.fullmatch(r"[\d.]+", metadata.get("ss_network_alpha", "")):
        return "in its metadata", {"lora_alpha": float(metadata["ss_network_alpha"])}
    beside = file.with_name(PEFT_CONFIG)
    if form == "PEFT" and beside.is_file():
        config = parse_object(beside.read_bytes())
        if "lora_alpha" in config:
            return f"in {PEFT_CONFIG}", config
    return "", {}


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """As PEFT computes it."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    named = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = float(next(named, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
