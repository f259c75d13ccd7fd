"""A CogVideoX checkpoint: built in, a local diffusers folder, or the hub.

Opening one reads JSON only, so that a wrong model is refused before any weight
is loaded or downloaded. Parts are fetched when they are first loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..cli.progress import stage
from ..errors import ModelError
from ..files.readers import read_in_order
from ..files.typed import parse_object
from ..words import first_line
from .families import BUILTIN_NAMES, FAMILIES, RANDOM, Family, Resolution, check_resolution, family_of
from .hub import fetch
from .remembered import Remembered
from .tiny import NATIVE as BUILTIN_NATIVE
from .tiny import builtin_folder
from .weights import check_weights, load_part, weight_files

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

_HASHING = 4  # files at a time
_END = 1 << 20  # bytes of a weights file's beginning, where its tensors are listed, and of its end

WeightedPart = Literal["transformer", "vae", "text_encoder"]
Component = Literal[WeightedPart, "tokenizer"]


@dataclass(frozen=True)
class WeightsIdentity:
    """What a part's output depends on: two hashes; the id and revision are for the reader."""

    id: str
    revision: str | None
    config_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Configs are the parts' own JSON."""

    name: str  # a built-in form, a hub id without a revision, or the absolute path of a local folder
    root: Path
    revision: str | None  # commit on the hub
    family: Family
    transformer_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    on_hub: bool

    @property
    def native(self) -> Resolution:
        """The size this checkpoint was trained at, and generates at by default."""
        if self.name.removeprefix(RANDOM) in BUILTIN_NAMES:
            return BUILTIN_NATIVE
        if self.family.patch_t is not None:  # 1.5's sample sizes are upper bounds of its positions
            return self.family.native
        config = self.transformer_config
        return Resolution(
            config.get("sample_frames", self.family.native.frames),
            config["sample_height"] * self.family.spatial,
            config["sample_width"] * self.family.spatial,
        )

    def check_resolution(self, resolution: Resolution) -> None:
        """Refuse a size that this checkpoint cannot take (`families.check_resolution`)."""
        check_resolution(self.family, self.native, self.transformer_config, resolution)

    def folder(self, part: Component) -> Path:
        """The part's folder, fetched first if the checkpoint lives on the hub."""
        if self.on_hub:
            fetch(self.name, [f"{part}/*"], self.revision)
        return self.root / part

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
        return self._load("vae", torch_dtype=dtype).eval().requires_grad_(False)

    def load_transformer(self, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
        return self._load("transformer", torch_dtype=dtype)

    def load_text_encoder(self, dtype: torch.dtype) -> T5EncoderModel:
        return self._load("text_encoder", dtype=dtype).eval().requires_grad_(False)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import T5Tokenizer

        folder = self.folder("tokenizer")
        try:
            return T5Tokenizer.from_pretrained(folder)
        except Exception as error:  # the libraries that read its files raise all kinds
            raise ModelError(
                f"the tokenizer of {self.name} cannot be loaded: {first_line(error)}",
                where=str(folder),
                fix="fetch the checkpoint again, or try --model tiny",
            ) from error

    def check_weights(self, *parts: WeightedPart) -> None:
        """Refuse parts whose files do not hold exactly the weights that they have, before one is read.

        Raises:
            ModelError: names the part and the first such weight.
        """
        for part in parts:
            check_weights(self.folder(part), part, self.name)

    def _load(self, part: WeightedPart, **options: Any) -> Any:
        return load_part(self.folder(part), part, self.name, **options)

    def bytes_of(self, part: WeightedPart) -> int:
        """Of a part's weight files."""
        return sum(file.stat().st_size for file in weight_files(self.folder(part), part, self.name))

    @property
    def fingerprint(self) -> str:
        """Tells the transformer's weights from others without reading all of them; nothing is fetched.

        On the hub the commit; of a folder a hash of the config, and of each file's name, size and both ends.
        """
        if self.on_hub:
            assert self.revision is not None
            return self.revision
        digest = hashlib.sha256(_facts_of(self.root / "transformer").encode())
        for file in sorted((self.root / "transformer").glob("*.safetensors")):
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                digest.update(f"{file.name} {size}\n".encode())
                for start in (0, max(0, size - _END)):
                    stream.seek(start)
                    digest.update(stream.read(_END))
        return digest.hexdigest()

    def identity(self, part: WeightedPart) -> WeightsIdentity:
        """Hashes of a part's config and weights (about 2 GB/s a core, once; free in the hub's cache)."""
        folder = self.folder(part)
        weight_files(folder, part, self.name)
        return WeightsIdentity(
            id=self.name,
            revision=self.revision,
            config_sha256=hashlib.sha256(_facts_of(folder).encode()).hexdigest(),
            weights_sha256=_weights_sha256(folder),
        )


def _facts_of(folder: Path) -> str:
    """A part's config, but for keys that start with "_": they say who wrote the file, not what it means."""
    config = parse_object((folder / "config.json").read_bytes())
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True)


def _weights_sha256(folder: Path) -> str:
    files, remembered = sorted(folder.glob("*.safetensors")), Remembered(folder)

    def of_file(file: Path) -> str:
        # The hub's cache stores a large file under its own sha256.
        blob = file.resolve().name if file.is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}", blob):
            return blob
        return remembered.recall(f"sha256 of {file.name}", [file], partial(_sha256, file))

    blobs = read_in_order(of_file, files, threads=_HASHING)
    lines = (f"{file.name} {blob}\n" for file, blob in zip(files, blobs, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    with file.open("rb") as stream, stage(f"hashing {file.parent.name}", file.stat().st_size, "byte") as bar:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            bar.advance(by=size)
    return digest.hexdigest()


_CONFIGS = {
    "transformer": "config.json", "vae": "config.json", "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}  # fmt: skip
# What we read of the parts' own JSON without asking; the rest is the business of the libraries.
_FACTS: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    *(
        ("transformer", key, (int,))
        for key in (
            "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim",
            "max_text_seq_length", "text_embed_dim", "sample_height", "sample_width",
        )
    ),
    ("vae", "scaling_factor", (int, float)),
    ("text_encoder", "d_model", (int,)),
    ("scheduler", "num_train_timesteps", (int,)),
    *(("scheduler", key, (int, float)) for key in ("beta_start", "beta_end", "snr_shift_scale")),
)  # fmt: skip


def open_checkpoint(name: str, revision: str | None = None, *, named_by: str | None = None) -> Checkpoint:
    """Open a checkpoint by name, without its weights.

    Args:
        name: a built-in form (``tiny``, ...), a local diffusers folder, or a hub id, perhaps with a revision:
            ``owner/name@revision``.
        revision: on the hub, of a name without one; None: the newest.
        named_by: what remembers the name, where it was not given now; an error says so.

    Raises:
        ModelError: it cannot be found or is no CogVideoX; says where it was looked for.
    """
    try:
        return _open(name, revision)
    except ModelError as error:
        if named_by is None:
            raise
        raise ModelError(
            error.what,
            where=f"{named_by} names this model; {error.where}",
            fix=f"--model FOLDER, if the checkpoint lies elsewhere now; else {error.fix}",
        ) from error


def _open(name: str, given: str | None) -> Checkpoint:
    on_hub = False
    revision = None
    if name.removeprefix(RANDOM) in BUILTIN_NAMES:
        root = builtin_folder(name)
    elif Path(name).expanduser().is_dir():
        root = Path(name).expanduser().resolve()
    elif (asked := re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?", name)) is not None:
        # A name in other capitals would be another one in the hub's cache on this machine.
        name = next((family.hub_id for family in FAMILIES if family.hub_id.lower() == asked[1].lower()), asked[1])
        root = fetch(name, ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*"], asked[2] or given)
        on_hub, revision = True, root.name
    else:
        raise _no_such_model(name)
    if not on_hub and name.removeprefix(RANDOM) not in BUILTIN_NAMES:
        name = str(root)  # shards and runs remember it, and are read from other working folders
    files = {part: root / part / file for part, file in _CONFIGS.items()}
    configs = {part: _read_json(file, name) for part, file in files.items()}
    family = family_of(configs["transformer"], where=str(files["transformer"]))
    for part, key, kinds in _FACTS:
        value = configs[part].get(key)
        if type(value) not in kinds or not 0 < value < float("inf"):  # type: ignore[operator]
            raise ModelError(
                f"{part}/{key} of {name} is {'missing' if value is None else f'{value!r}, which cannot be'}",
                where=str(files[part]),
                fix=f"take that file of {family.hub_id}",
            )
    return Checkpoint(
        name=name,
        root=root,
        revision=revision,
        family=family,
        transformer_config=configs["transformer"],
        vae_config=configs["vae"],
        text_config=configs["text_encoder"],
        scheduler_config=configs["scheduler"],
        on_hub=on_hub,
    )


def _no_such_model(name: str) -> ModelError:
    """What may have been meant by a name that is none."""
    where = "it is neither a built-in form, nor a folder, nor a hub id (owner/name)"
    if Path(name).expanduser().is_file():
        return ModelError(
            f"{name} is a single file",
            where="a checkpoint is a diffusers folder: transformer, vae, text_encoder, tokenizer and scheduler",
            fix="--model FOLDER, or a hub id; diffusers' from_single_file and save_pretrained make a folder of a file",
        )

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9.]", "", text.lower().split("/")[-1])

    meant = next((f.hub_id for f in FAMILIES if letters(name) in (letters(f.hub_id), letters(f.name))), None)
    names = [*BUILTIN_NAMES, *(family.hub_id for family in FAMILIES)]
    return ModelError(f"no model {name!r}", where=where, fix=f"--model {meant or ' | '.join(names)}")


def _read_json(path: Path, name: str) -> Mapping[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        if (path.parents[2] / "model_index.json").is_file():
            raise ModelError(
                f"{path.parents[1].name} is a part of a checkpoint, not all of it",
                where=str(path.parents[1]),
                fix=f"--model {path.parents[2]}",
            ) from error
        raise ModelError(
            f"{name} is not a whole diffusers checkpoint: {path.parent.name}/{path.name} is missing or damaged",
            where=str(path),
            fix="fetch it again; it needs transformer, vae, text_encoder, tokenizer and scheduler",
        ) from error
