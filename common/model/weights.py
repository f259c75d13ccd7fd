"""Whether a part of a checkpoint holds exactly the weights that its class has. Reads headers, no weight.

The libraries fill a missing weight with random numbers, or leave it without any, and pass over one too
many; each of them is another model than the one that was named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ModelError
from ..files.typed import parse_object
from ..libraries import importing, quiet_library
from ..words import counted, first_line
from .remembered import Remembered
from .tensor_file import open_tensors

if TYPE_CHECKING:
    import torch

_INDEX = ".index.json"
_CONFIG = "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = ("BF16", "F16", "F32", "F64")
# A whole T5 may lie in text_encoder; its decoder and head are no part of the encoder.
_OF_WHOLE_T5 = re.compile(r"(decoder|lm_head)\.")


@dataclass(frozen=True)
class PartClass:
    """The class of a part, and the name that it gives to its weights."""

    library: Literal["transformers", "diffusers"]
    name: str
    file: str

    @importing()
    def load(self) -> Any:
        """The class."""
        quiet_library("transformers")  # diffusers' models import it, too
        return getattr(quiet_library(self.library), self.name)

    def on_meta(self, folder: Path) -> torch.nn.Module:
        """The part as its config.json describes it, without memory behind its weights.

        Raises:
            ModelError: no such part can be made.
        """
        import torch

        cls = self.load()
        try:
            config = parse_object((folder / _CONFIG).read_bytes())
            with torch.device("meta"):
                if self.library == "diffusers":
                    return cls.from_config(config)
                return cls(cls.config_class.from_dict(config))
        # What a foreign config makes of a class can be anything; it is the file's fault.
        except Exception as error:
            raise ModelError(
                f"the {folder.name} cannot be made from its config.json: {first_line(error)}",
                where=str(folder / _CONFIG),
                fix="take the config.json of the published checkpoint",
            ) from error


CLASSES: Mapping[str, PartClass] = {
    "transformer": PartClass("diffusers", "CogVideoXTransformer3DModel", "diffusion_pytorch_model.safetensors"),
    "vae": PartClass("diffusers", "AutoencoderKLCogVideoX", "diffusion_pytorch_model.safetensors"),
    "text_encoder": PartClass("transformers", "T5EncoderModel", "model.safetensors"),
}


@dataclass(frozen=True)
class Stored:
    """A weight as a file has it."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


def weight_files(folder: Path, part: str, model: str) -> list[Path]:
    """The files that the weights of a part are read from.

    Args:
        part: a name of `CLASSES`.
        model: the checkpoint's name, for the message.

    Raises:
        ModelError: there are none, or others than these; says which are there.
    """
    usual = folder / CLASSES[part].file
    index = folder / (usual.name + _INDEX)
    if index.is_file():
        names = _names_of(index, part, model)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"the {part} of {model} lacks {counted(len(missing), 'file')} of its {len(names)}: {missing[0]}",
                where=str(index),
                fix=_AGAIN,
            )
        return [folder / name for name in names]
    if usual.is_file():
        return [usual]
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variants = [name for name in there if name.endswith(".safetensors")]
    pickles = [name for name in there if name.endswith(_PICKLES)]
    if variants:
        what, fix = f"only a variant, {variants[0]}", _AGAIN
        if len(variants) == 1:
            fix = f"rename it to {usual.name}, if its precision is the one you want, or fetch the checkpoint without it"
    elif pickles:
        what = f"only {pickles[0]}, which is a pickle: reading one can run any program"
        fix = "fetch the checkpoint with its safetensors files"
    else:
        what, fix = "no weights", _AGAIN
    raise ModelError(f"the {part} of {model} has {what}; no {usual.name}", where=str(folder), fix=fix)


_AGAIN = "fetch the checkpoint again, or convert it again: every weight under the name that diffusers has for it"


def _names_of(index: Path, part: str, model: str) -> list[str]:
    try:
        names = set(parse_object(index.read_bytes())["weight_map"].values())
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the list of the {part} of {model} is damaged: {error}", where=str(index), fix=_AGAIN
        ) from error
    return sorted(names)


def check_weights(folder: Path, part: str, model: str) -> None:
    """Refuse a part that lacks a weight, has one too many, or one of another shape or no number type.

    A part that has passed is not looked at again until one of its files changes, or the libraries do: looking takes
    the import of its class, which is most of what a command does that has nothing to do.

    Args:
        part: a name of `CLASSES`.
        model: the checkpoint's name, for the message.

    Raises:
        ModelError: names the part and the first such weight.
    """
    files = weight_files(folder, part, model)
    also = [file for name in (_CONFIG, CLASSES[part].file + _INDEX) if (file := folder / name).is_file()]

    def look() -> str:
        _check(folder, part, model, files)
        return "whole"

    Remembered(folder).recall(f"{part} by {_rules()}", [*also, *files], look)


@cache
def _rules() -> str:
    """Tells what a part was checked by: the classes' libraries, and this file."""
    libraries = " ".join(f"{name} {version(name)}" for name in sorted({row.library for row in CLASSES.values()}))
    return f"{libraries} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


@importing()
def _check(folder: Path, part: str, model: str, files: Sequence[Path]) -> None:
    stored = _read_headers(files, part, model)
    module = CLASSES[part].on_meta(folder)
    groups = _tied(module)
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    lacking = [group[0] for group in groups if not any(name in stored for name in group)]
    # A buffer that the class computes itself may lie in the file as well.
    free = {name for name, _ in module.named_buffers()} - wanted.keys()
    others = [
        name
        for name in sorted(stored.keys() - wanted.keys() - free)
        if part != "text_encoder" or not _OF_WHOLE_T5.match(name)
    ]
    faults = []
    if lacking:
        faults.append(f"lacks {counted(len(lacking), 'weight')} of its {len(groups):,}, the first {lacking[0]}")
    if others:
        faults.append(f"has {counted(len(others), 'weight')} that belong to no part of it, the first {others[0]}")
    for name, weight in stored.items():
        if name in wanted and weight.shape != wanted[name]:
            asked = f"its config.json asks for {_shape(wanted[name])}"
            faults.append(f"has {name} of shape {_shape(weight.shape)}, and {asked}")
            break
        if name in wanted and weight.dtype not in _FLOATS:
            faults.append(f"has {name} in {weight.dtype}, which is no precision that it can be computed in")
            break
    if faults:
        raise ModelError(f"the {part} of {model} {', and '.join(faults)}", where=str(folder), fix=_AGAIN)


def load_part(folder: Path, part: str, model: str, **options: Any) -> Any:
    """A part with its weights, never from a pickle.

    Args:
        part: a name of `CLASSES`.
        model: the checkpoint's name, for the message.
        options: of the class's ``from_pretrained``.

    Raises:
        ModelError: as `check_weights`, or the library cannot read it.
    """
    check_weights(folder, part, model)
    try:
        return CLASSES[part].load().from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the {part} of {model} cannot be loaded: {first_line(error)}",
            where=str(folder),
            fix="fetch the checkpoint again, or try --model tiny",
        ) from error


def _read_headers(files: Sequence[Path], part: str, model: str) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for file in files:
        with open_tensors(file, f"the {part} of {model}") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                tensor = opened.get_slice(name)
                stored[name] = Stored(tensor.get_dtype(), tuple(tensor.get_shape()))
    return stored


def _tied(module: torch.nn.Module) -> list[list[str]]:
    """Names of the module's weights in order; those that share one weight stand together, and one of them is enough."""
    groups: dict[int, list[str]] = {}
    for name, weight in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(weight), []).append(name)
    return list(groups.values())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
