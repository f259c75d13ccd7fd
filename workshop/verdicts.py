"""What fits on which card and host: `cogtrain plan`'s answers for one GPU, as tables of the pages."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from cogcommon.model.cards import card_named
from cogcommon.model.families import BY_NAME, Family
from cogcommon.model.published import published
from cogcommon.words import in_words
from cogtrain.commands.forecast import intents, lines_of
from cogtrain.commands.plan import advised, best_few
from cogtrain.memory.cost import plan_cost
from cogtrain.memory.estimate import estimate
from cogtrain.memory.machine import Machine, machine_for
from cogtrain.settings.planning import ForecastSettings
from cogtrain.settings.training import Strategy

_CARDS, _HOSTS = (12, 16, 24, 48, 80), (16, 32, 64, 128)  # GB
_NAMED, _THEIR_HOST = ("4060", "4070", "4080", "4090", "l40s", "h100"), 64  # of the first page's table
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


def card_table() -> str:
    """For a card of each size what a LoRA of each model takes, and the time of 500 steps, as Markdown."""
    native = [f"{family.upper()} at {BY_NAME[family].native}" for family in _FAMILIES]
    lines = [f"| GPU | {' | '.join(native)} |", "|---|" + "---|" * len(native)]
    for name in _NAMED:
        machine = machine_for(ForecastSettings(gpu=name, host=f"{_THEIR_HOST}GB"))
        cells = [_takes(machine, BY_NAME[family]) for family in _FAMILIES]
        lines.append(f"| {card_named(name).sold} GB ({machine.name}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def eight_table() -> str:
    """Full fine-tuning on eight GPUs: what is computed for H200s, and for A100s what is known, as Markdown."""
    lines = [
        "| all weights of | strategy | each GPU, host in all | 8 x H200, a step | 500 steps "
        "| 8 x A100, computing alone |",
        "|---|---|---|---|---|---|",
    ]
    h200, a100 = (machine_for(ForecastSettings(gpu=name, gpus=8)) for name in ("h200", "a100 80gb"))
    assert a100.speed
    strategies: tuple[Strategy, ...] = ("zero2", "zero3")
    for name, strategy in product(_FAMILIES, strategies):
        family = BY_NAME[name]
        (run,) = intents(ForecastSettings(method="sft"), published(family), [family.native], h200)
        line = next(x for x in lines_of(run, h200) if (x.strategy, x.memory) == (strategy, "auto"))
        needs = estimate(run, card=a100.gpu, processes=8, speed=a100.speed, strategy=strategy, memory="auto")
        assert needs.fits(a100.gpu) and line.computed_s
        alone = plan_cost(run, replace(needs.load, trained=0), a100.speed)(needs.plan)
        lines.append(
            f"| {name.upper()} | {strategy} | {line.peak_gib:.0f} GB, {line.host_total_gib:.0f} GB "
            f"| {line.computed_s:.1f} s | {in_words(500 * line.computed_s)} | {alone:.1f} s |"
        )
    return "\n".join(lines)


def _takes(machine: Machine, family: Family) -> str:
    (run,) = intents(ForecastSettings(method="lora"), published(family), [family.native], machine)
    line = advised(lines_of(run, machine), "lora")
    if line is None:
        return "needs more host memory"
    assert line.computed_s
    return f"{line.peak_gib:.0f} + {line.host_total_gib:.0f} GB, {in_words(500 * line.computed_s)}"


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
