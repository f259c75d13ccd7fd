"""The ready settings in configs/: each row of the hardware table parses as its first line says, and trains."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from places import ROOT

from cogtrain.cli import app
from cogtrain.distributed.strategies import STRATEGIES
from cogtrain.distributed.zero_config import choose_strategy, deepspeed_config
from cogtrain.runs import opening
from cogtrain.runs.folder import read_metrics
from cogtrain.settings.training import LoraSettings, SftSettings

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
TEMPLATES = sorted((ROOT / "configs/deepspeed").glob("*.json"))
FORM = {"2b": "tiny-2b", "5b": "tiny", "1.5-5b": "tiny-1.5", "5b-i2v": "tiny-i2v"}

# model, method, strategy, GPUs (0: all), precision: the table of sixteen rows, and image-to-video.
TABLE = [
    ("2b", "lora", "ddp", 0, "fp16"), ("5b", "lora", "ddp", 0, "bf16"), ("1.5-5b", "lora", "ddp", 0, "bf16"),
    ("2b", "sft", "ddp", 0, "fp16"), ("2b", "sft", "zero2-offload", 1, "fp16"), ("2b", "sft", "zero2", 8, "fp16"),
    ("2b", "sft", "zero3", 8, "fp16"), ("2b", "sft", "zero3-offload", 8, "bf16"),
    *((model, "sft", strategy, gpus, "bf16") for model in ("5b", "1.5-5b") for strategy, gpus in (
        ("zero2-offload", 1), ("zero2", 8), ("zero3", 8), ("zero3-offload", 8))),
    ("5b-i2v", "lora", "ddp", 0, "bf16"),
]  # fmt: skip


def parsed(config, monkeypatch):
    """The settings that the command on the first line gives, through the command line itself."""

    class Parsed(Exception):
        pass

    def stop(settings, device, world, peers=None):
        raise Parsed(settings)

    first = config.read_text().splitlines()[0]
    program, *words = shlex.split(first.removeprefix("# "))
    assert program == "cogtrain"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(opening, "open_run", stop)
    with pytest.raises(Parsed) as caught:
        app(words, standalone_mode=False)
    return caught.value.args[0]


def test_there_is_one_for_every_row():
    assert len(CONFIGS) == len(TABLE) == 17


@pytest.mark.parametrize("config, row", [*zip(CONFIGS, TABLE, strict=True)], ids=[config.stem for config in CONFIGS])
def test_the_first_line_gives_the_row(config, row, monkeypatch):
    model, method, strategy, gpus, precision = row
    settings = parsed(config, monkeypatch)
    assert isinstance(settings, LoraSettings if method == "lora" else SftSettings)
    assert (settings.strategy, settings.precision, settings.nproc or 0) == (strategy, precision, gpus)
    assert settings.config == Path("configs") / config.name
    assert settings.shards == ["out/*.tar"]
    assert f"-{model}-{method}-{strategy}" in f"-{config.stem}"
    assert settings.lr == type(settings)().lr
    assert not isinstance(settings, LoraSettings) or settings.rank == 128


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((3, 4, 5, 10, 12, 15, 17), id="each-method-and-strategy"),
        pytest.param(range(1, 18), id="all", marks=pytest.mark.full),  # a minute
    ],
)
def test_rows_train_at_the_built_in_size(tmp_path, make_shards, run_ranks, monkeypatch, numbers):
    """Two real steps each, on two processes, with all that the file sets but precision, rank and GPUs."""
    rows = [(CONFIGS[number - 1], TABLE[number - 1]) for number in numbers]
    for form in FORM.values():
        make_shards(tmp_path / form, form, samples=4)
    groups = {"ddp": [], "zero": []}
    for config, (model, method, strategy, *_) in rows:
        given = dataclasses.asdict(parsed(config, monkeypatch))
        given |= {"shards": [str(tmp_path / FORM[model])], "out": str(tmp_path / "runs" / config.stem), "steps": 2}
        given |= {"precision": "fp32", "nproc": None, "config": None} | ({"rank": 4} if method == "lora" else {})
        case = {"name": config.stem, "method": method, "settings": {k: v for k, v in given.items() if v is not None}}
        groups["ddp" if strategy == "ddp" else "zero"].append(case)
    for name, cases in groups.items():
        run_ranks(2, cases, tmp_path / f"ranks-{name}")
    for config, _ in rows:
        steps, _ = read_metrics(tmp_path / "runs" / config.stem / "metrics.jsonl")
        assert [line.step for line in steps] == [1, 2], config.stem
        exports = {path.name for path in (tmp_path / "runs" / config.stem).iterdir()}
        assert exports & {"pytorch_lora_weights.safetensors", "transformer"}, config.stem


@pytest.mark.parametrize("template", TEMPLATES, ids=[template.stem for template in TEMPLATES])
def test_a_template_changes_nothing_and_names_its_strategy(template):
    """It is where a user starts to change things; as it is, it says what would be derived anyhow."""
    settings = SftSettings(deepspeed=template, batch_size=2, accumulate=3, max_grad_norm=0.5)
    assert choose_strategy(settings, full=True, gpus=8) == template.stem
    without = dataclasses.replace(settings, deepspeed=None)
    for precision in ("bf16", "fp16", "fp32"):
        expected = deepspeed_config(without, template.stem, precision, 8)
        assert deepspeed_config(settings, template.stem, precision, 8) == expected


def test_there_is_a_template_for_every_strategy():
    assert {template.stem for template in TEMPLATES} == set(STRATEGIES) - {"ddp"}
