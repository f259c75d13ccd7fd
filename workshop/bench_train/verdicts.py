"""What fits on which card and host: `cogtrain plan`'s answers for one GPU, as a table of configs/README.md."""

from __future__ import annotations

from itertools import product

from cogcommon.model.families import BY_NAME
from cogcommon.model.published import published
from cogtrain.commands.forecast import intents, lines_of
from cogtrain.commands.plan import advised, best_few
from cogtrain.memory.machine import machine_for
from cogtrain.settings import ForecastSettings

_CARDS, _HOSTS = (12, 16, 24, 48, 80), (32, 64, 128)  # GB
_METHODS, _FAMILIES = {"lora": "LoRA", "sft": "all weights"}, ("2b", "5b", "1.5-5b")


def verdict_table() -> str:
    """For each card and host what is advised for each model at its native size, or what lacks, as Markdown."""
    wanted = list(product(_METHODS, _FAMILIES))
    names = [f"{family.upper()} {_METHODS[method]}" for method, family in wanted]
    lines = [f"| GPU | host | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for card, host in product(_CARDS, _HOSTS):
        cells = [_verdict(card, host, method, family) for method, family in wanted]
        lines.append(f"| {card} GB | {host} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(card: int, host: int, method: str, family_name: str) -> str:
    """The advised setting, and the GPU and host memory that it takes; or which of them no setting does with."""
    family = BY_NAME[family_name]
    settings = ForecastSettings(gpu=f"{card}GB", host=f"{host}GB", method=method)  # type: ignore[arg-type]
    machine = machine_for(settings)
    (run,) = intents(settings, published(family), [family.native], machine)
    lines = lines_of(run, machine)
    if line := advised(lines, method):
        how = f"`{line.memory}`" if line.strategy == "ddp" else f"`{line.strategy}` `{line.memory}`"
        return f"{how}, {line.peak_gib:.1f} + {line.host_total_gib:.0f} GB"
    return f"no: {best_few(lines)[0].lacks}"
