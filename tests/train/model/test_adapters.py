"""rsLoRA: the scale of PEFT's own, through training, resume and export; and what a run says of it."""

import json
import types
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from cogcommon.errors import RunError, SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.commands import export
from cogtrain.data.batches import Collator, read_sample
from cogtrain.data.sampler import Slot
from cogtrain.data.shards import open_shards
from cogtrain.memory.weights import trained_weights
from cogtrain.model import lora
from cogtrain.model.adapters import ADAPTERS
from cogtrain.model.compare import difference, output_on_noise
from cogtrain.model.lora_file import read_facts
from cogtrain.model.method import method_of
from cogtrain.model.objective import Objective
from cogtrain.settings.results import ExportSettings
from cogtrain.settings.training import AdapterName, LoraSettings

RANK, ALPHA = 6, 3.0  # alpha/sqrt(rank) is 1.22; alpha/rank, 0.5


def test_a_row_for_every_name():
    assert tuple(ADAPTERS) == get_args(AdapterName)


def adapters(transformer):
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def test_loss_and_gradients_are_those_of_pefts_own_rslora(tmp_path, make_shards, live_model):
    """PEFT is given `use_rslora` here, which the program never does."""
    shards = open_shards([str(make_shards(tmp_path, "random-tiny", samples=1)[0])])
    checkpoint, ours = live_model(rank=RANK, alpha=ALPHA, adapter="rslora")
    theirs = checkpoint.load_transformer(torch.float32)
    theirs.requires_grad_(False)
    targets = list(LoraSettings().target_modules)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=targets))
    objective = Objective.of(checkpoint)
    batch = Collator(objective, seed=1)([read_sample(shards, 0)], [Slot(0, 0, 0)], [500])
    with torch.no_grad():
        for name, parameter in adapters(theirs).items():
            parameter.copy_(adapters(ours)[name])
    losses = [objective.losses(model, batch, torch.float32).mean() for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for name, parameter in adapters(theirs).items():
        torch.testing.assert_close(adapters(ours)[name].grad, parameter.grad, rtol=1e-4, atol=1e-7)
    plain = objective.losses(live_model(rank=RANK, alpha=ALPHA)[1], batch, torch.float32).mean()
    assert abs(plain / losses[1] - 1) > 1e-3, "the scale must matter, or the test shows nothing"


def test_a_plan_counts_the_weights_that_it_trains():
    checkpoint = open_checkpoint("tiny")
    settings = LoraSettings(adapter="rslora", rank=RANK)
    transformer = checkpoint.load_transformer(torch.float32)
    method_of(settings).apply(transformer)
    run = types.SimpleNamespace(checkpoint=checkpoint, settings=settings)
    assert trained_weights(run) == sum(parameter.numel() for parameter in adapters(transformer).values())
    assert (method_of(settings).alpha, method_of(LoraSettings(rank=RANK)).alpha) == (8, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_shards):
    """Two steps of rsLoRA, at a rate that lets the losses depend on every step before."""
    from accelerate.state import AcceleratorState

    from cogtrain.distributed.signals import StopRequest
    from cogtrain.runs.opening import open_run
    from cogtrain.trainer.trainer import train

    top = tmp_path_factory.mktemp("rslora")
    make_shards(top / "out", samples=4)

    def train_in(name, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = {"adapter": "rslora", "rank": 4, "alpha": 3.0, "steps": 2, "lr": 0.1, "save_every": 1} | options
        settings = LoraSettings(shards=[str(top / "out")], out=top / name, **given)
        return train(open_run(settings, torch.device("cpu"), 1), StopRequest())

    train_in("run")
    return train_in


def test_a_resumed_run_keeps_its_adapter(run, losses):
    whole, resumed = run("whole", steps=3), run("run", steps=3)
    assert losses(whole) == losses(resumed)
    assert losses(whole) != losses(run("plain", steps=3, adapter="lora"))
    ours, theirs = (load_file(folder / lora.FILE) for folder in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    with pytest.raises(RunError, match="another --adapter: rslora then, lora now"):
        run("run", steps=4, adapter="lora")
    state = json.loads((resumed.parent / "plain/checkpoint-3/state.json").read_text())
    del state["facts"]["--adapter"]  # as of a checkpoint older than rsLoRA
    (resumed.parent / "plain/checkpoint-3/state.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match="another --adapter: lora then, rslora now"):
        run("plain", steps=4)
    assert len(losses(run("plain", steps=4, adapter="lora"))) == 4


def test_every_form_of_its_export_answers_as_the_run(run, capsys):
    folder = run("run", steps=3)
    live = open_checkpoint("tiny").load_transformer(torch.float32)
    lora.attach(live, 4, 3.0, adapter="rslora")
    from cogtrain.distributed.strategy import read_weights

    with torch.no_grad():
        for name, weight in read_weights(folder / "checkpoint-3").items():
            live.get_parameter(name).copy_(weight)
    expected = output_on_noise(live)
    fresh = open_checkpoint("tiny").load_transformer(torch.float32)
    assert difference(output_on_noise(fresh), expected) > 1e-3

    fresh.load_lora_adapter(load_file(folder / lora.FILE), prefix="transformer")
    assert difference(expected, output_on_noise(fresh)) < 1e-5
    for source in (folder, folder / "checkpoint-3"):  # from the file, and from the settings
        export.run(ExportSettings(run=source, to="peft", json=True, out=folder.parent / "peft" / source.name))
        loaded = PeftModel.from_pretrained(
            open_checkpoint("tiny").load_transformer(torch.float32), folder.parent / "peft" / source.name
        )
        assert difference(expected, output_on_noise(loaded.get_base_model())) < 1e-5
    capsys.readouterr()


def test_the_run_tells_its_adapter(run):
    folder = run("run", steps=3)
    assert read_facts(folder / lora.FILE)["adapter"] == "rslora"
    assert 'adapter = "rslora"' in (folder / "config.toml").read_text()
    assert "# rsLoRA of tiny" in (folder / "README.md").read_text()
    assert "<h1>rsLoRA of tiny</h1>" in (folder / "report.html").read_text()


def test_another_adapter_is_refused_in_words(tmp_path):
    from cogcommon.cli.settings import resolve

    (tmp_path / "config.toml").write_text('adapter = "dora"\n')
    with pytest.raises(SettingError, match="'lora' or 'rslora'"):
        resolve(LoraSettings, {}, tmp_path / "config.toml")
