"""Whether shards, a model and validation shards belong together; asked before any weight is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from cogcommon.cli.names import quoted
from cogcommon.errors import ModelError, ShardError
from cogcommon.model.checkpoint import Checkpoint
from cogcommon.shards.contract import Contract

from .shard_set import ShardSet


def check_model(contract: Contract, checkpoint: Checkpoint, where: str) -> None:
    """Refuse a model for which the shards were not made; no weight of the transformer is touched.

    Raises:
        ModelError: with both values.
    """
    ours = f"--model {quoted(checkpoint.name)}"
    fix = f"encode the clips again with `cogprep encode {ours}`"
    if contract.model != checkpoint.name:
        fix = f"--model {quoted(contract.model)}, or {fix}"
    vae = checkpoint.vae_config
    facts = {
        "family": (contract.family, checkpoint.family.name),
        "task": (contract.task, checkpoint.family.task),
        "text length": (contract.text_tokens, checkpoint.transformer_config["max_text_seq_length"]),
        "text width": (contract.text_dim, checkpoint.transformer_config["text_embed_dim"]),
        "VAE scaling factor": (contract.scaling_factor, vae["scaling_factor"]),
    }
    for name, (theirs, mine) in facts.items():
        if theirs != mine:
            raise ModelError(
                f"the shards are for {name} {theirs}, the model has {mine}", where=f"{where}, {ours}", fix=fix
            )
    if checkpoint.on_hub and (checkpoint.name, checkpoint.revision) == (contract.model, contract.revision):
        return  # the commit answers for the VAE's weights, which training need not download
    mine_vae = checkpoint.identity("vae")
    for name in ("config_sha256", "weights_sha256"):
        theirs_hash, mine_hash = getattr(contract.vae, name), getattr(mine_vae, name)
        if theirs_hash != mine_hash:
            raise ModelError(
                f"the shards were made with another VAE: its {name.replace('_', ' ')} is {theirs_hash[:12]}, "
                f"the model's is {mine_hash[:12]}",
                where=f"{where}, {ours}",
                fix=fix,
            )


def check_shards_alike(training: Contract, held_out: Contract, where: str) -> None:
    """Refuse validation shards that another model's encode made.

    Raises:
        ShardError: with the facts that differ.
    """
    names = ("family", "task", "scaling_factor", "text_tokens", "text_dim", "dtype")
    mine = {name: getattr(training, name) for name in names} | {"vae": training.vae.weights_sha256}
    theirs = {name: getattr(held_out, name) for name in names} | {"vae": held_out.vae.weights_sha256}
    differing = [
        f"{name}: {mine[name]} in --shards, {theirs[name]} here" for name in mine if mine[name] != theirs[name]
    ]
    if differing:
        raise ShardError(
            f"validation shards for another model: {'; '.join(differing)}",
            where=where,
            fix="encode both with the same --model (`cogprep encode --holdout N` does)",
        )


def lost_tars(shards: ShardSet) -> list[str]:
    """Tars that are gone from the shards' local folders, though their records are there: a copy that was cut short."""
    folders = {Path(shard.path).parent for shard in shards.shards if not shard.file.remote}
    records = (record for folder in sorted(folders) for record in sorted(folder.glob("[0-9]*.parquet")))
    named = (record for record in records if re.fullmatch("[0-9]{6,}", record.stem))
    return [str(tar) for tar in (record.with_suffix(".tar") for record in named) if not tar.exists()]
