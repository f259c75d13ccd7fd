"""The contract of a set of shards: how its samples were encoded. It travels with the data.

The contract stands in ``contract.json`` of the folder and in every shard's
record. Its fingerprint covers every setting and weight that changes a tensor;
samples of two fingerprints never share a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from ..errors import SettingError, ShardError
from ..files.typed import build, parse_object
from ..model.checkpoint import WeightsIdentity
from ..model.device import Dtype
from ..model.families import BY_NAME, Family, Resolution, Task

SCHEMA = 1
CONTRACT_FILE = "contract.json"
EMPTY_CAPTION_FILE = "empty_caption.safetensors"  # tensor "text", shape (L, D)

# Which clips a folder holds, and how they are named: folders that differ in these alone can be trained together.
OF_THE_CLIPS = ("--id-token", "--resolution")
# For the reader, not for the tensors.
_NOT_FINGERPRINTED = ("model", "revision", "tool_version", "empty_caption_sha256")

# Facts in which two contracts differ most often, the likeliest first; others follow from them, or are seldom changed.
_TOLD_FIRST = (
    "family", "task", "--resolution", "--fit", "--crop", "--frames", "--short", "--start", "--stride", "--hdr",
    "--id-token", "dtype", "posterior", "image_variants", "tiling",
)  # fmt: skip


@dataclass(frozen=True)
class Contract:
    """See the module. Latents are stored unscaled, as (C, F', H/8, W/8).

    ``settings`` holds the encode settings that change a tensor, by name, as
    JSON values: resolutions, frames, start, stride, short, fit, crop, and the
    seed where anything was drawn at random.
    """

    family: str
    task: Task
    model: str  # as --model was given; the default of the trainer
    revision: str | None
    vae: WeightsIdentity
    text_encoder: WeightsIdentity
    scaling_factor: float
    posterior: Literal["moments", "sample"]
    image_variants: int  # pre-noised image latents a sample, 0 for T2V
    tiling: Literal["off", "on", "auto"]
    dtype: Dtype
    text_tokens: int
    text_dim: int
    settings: Mapping[str, Any]
    tool_version: str
    empty_caption_sha256: str = ""  # of the file's bytes
    latents_scaled: bool = False
    layout: str = "CFHW"
    schema: int = SCHEMA

    def _check(self) -> None:
        """Refuse values that have the right type, and that no encode writes.

        Raises:
            ValueError, SettingError: with the first of them.
        """
        family = BY_NAME.get(self.family)
        if family is None or family.task != self.task:
            raise ValueError(f"there is no family {self.family!r} for {self.task}")
        if not (0 < self.scaling_factor < float("inf") and self.text_tokens > 0 and self.text_dim > 0):
            raise ValueError("a size that cannot be")
        if self.image_variants < (self.task == "i2v"):
            raise ValueError(f"{self.image_variants} image variants")
        if self.latents_scaled or self.layout != "CFHW":
            raise ValueError("latents in a form that this version does not read")
        _ = self.buckets

    @property
    def buckets(self) -> list[Resolution]:
        """The sizes that clips were cut to.

        Raises:
            ValueError, SettingError: the settings do not say them.
        """
        sizes = self.settings.get("resolution")
        if not isinstance(sizes, list) or not sizes or not all(isinstance(size, str) for size in sizes):
            raise ValueError("settings: no resolution")
        buckets = [Resolution.parse(size) for size in sizes]
        for misfit in map(self.family_row.misfit, buckets):
            if misfit:
                raise misfit
        return buckets

    @property
    def family_row(self) -> Family:
        return BY_NAME[self.family]

    def facts(self) -> dict[str, Any]:
        """What the fingerprint covers, as flat names and JSON values."""
        flat: dict[str, Any] = {}
        for name, value in json.loads(self.to_json()).items():
            if name in _NOT_FINGERPRINTED:
                continue
            if name in ("vae", "text_encoder"):
                flat |= {f"{name}.{key}": value[key] for key in ("config_sha256", "weights_sha256")}
            elif name == "settings":
                flat |= {f"--{key.replace('_', '-')}": inner for key, inner in value.items()}
            else:
                flat[name] = value
        return flat

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the facts, in hex."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Contract, *, but: Collection[str] = ()) -> list[str]:
        """``name: ours, theirs`` for every fact in which two contracts differ, but for some names; likely first.

        Where only one was drawn at random, its seed is nobody's doing: what drew it (task, crop, posterior) is told.
        """
        ours, theirs = self.facts(), other.facts()

        def short(facts: Mapping[str, Any], name: str) -> str:
            value = facts.get(name)
            if name not in facts:
                return "not recorded"
            return repr(value[:12] if isinstance(value, str) and len(value) == 64 else value)  # a hash

        names = {name for name in (ours.keys() | theirs.keys()) - set(but) if ours.get(name) != theirs.get(name)}
        if len(names) > 1 and ("--seed" in ours) != ("--seed" in theirs):
            names.discard("--seed")
        order = {name: place for place, name in enumerate(_TOLD_FIRST)}
        return [
            f"{name}: {short(ours, name)} here, {short(theirs, name)} there"
            for name in sorted(names, key=lambda name: (order.get(name, len(order)), name))
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> Contract:
        """Read a contract back.

        Raises:
            ShardError: not a contract, or of another schema version.
        """
        try:
            contract, schema = _parse(text)
        except (ValueError, SettingError) as error:
            raise ShardError(
                f"not a shard contract: {error.what if isinstance(error, SettingError) else error}",
                where=where,
                fix="remove it; `cogprep index OUT` takes it from the record of a shard",
            ) from error
        if contract is not None:
            return contract
        raise ShardError(
            f"shards of schema {schema}; this version reads schema {SCHEMA}",
            where=where,
            fix="encode again into a new folder, or use the version that made them",
        )


@lru_cache(maxsize=16)  # every record of a folder holds the same; to read it takes longer than the record's rows
def _parse(text: str | bytes) -> tuple[Contract | None, Any]:
    """The contract, None if it is of another schema; and the schema.

    Raises:
        ValueError, SettingError: it is no contract.
    """
    values = parse_object(text)
    schema = values.get("schema")
    if schema != SCHEMA or type(schema) is not int:
        return None, schema
    contract = build(Contract, values)
    contract._check()
    return contract, schema
