"""What cannot be is refused with one message, before a weight is read: exit 2 and no traceback."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.errors import CogError, DiskError, ModelError, RunError, SettingError
from cogcommon.files.memory import Headroom
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.shards.records import read_record, write_record
from cogtrain.blocks import trial
from cogtrain.distributed.zero_config import choose_strategy, deepspeed_config
from cogtrain.memory import ready
from cogtrain.memory.estimate import estimate
from cogtrain.memory.ready import check_ready
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings, SftSettings

CPU = torch.device("cpu")


@pytest.fixture
def open_here(tmp_path, make_shards, monkeypatch):
    """open_here(world=1, cls=LoraSettings, **settings); any weight that is loaded is a failure."""
    make_shards(tmp_path / "out", samples=4)
    monkeypatch.chdir(tmp_path)
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(Checkpoint, name, lambda *args: pytest.fail("a weight was loaded"))

    def open_it(world=1, cls=LoraSettings, **settings):
        return open_run(cls(**{"shards": ["out/*.tar"]} | settings), CPU, world)

    return open_it


@pytest.mark.parametrize(
    ("options", "says", "where", "fix"),
    [
        ({"model": "tiny-2b"}, "for family 5b, the model has 2b", "--model tiny-2b", "--model tiny"),
        ({"model": "tiny-i2v"}, "family 5b, the model has 5b-i2v", "--model tiny-i2v", "--model tiny"),
        ({"model": "nothing-like-it"}, "no model", "neither a built-in form", "--model"),
        ({"shards": []}, "--shards is not given", "", "out/*.tar"),
        ({"shards": ["none/*.tar"]}, "no shard matches", "--shards", "out/*.tar"),
        ({"validate_shards": ["out/val/*.tar"]}, "no shard matches", "--validate-shards", "--holdout N"),
        ({"validate_shards": ["out"]}, "none is left to train on", "out/", "--validate-shards"),
        ({"world": 9}, "9 processes and only 4 samples", "--nproc", "--nproc 4"),
        ({"batch_size": 3, "accumulate": 2}, "a step takes 6 samples", "--batch-size", "smaller"),
        ({"global_batch": 6}, "a step takes 6 samples", "--global-batch, --shards", "a smaller --global-batch"),
        ({"resume": "gone"}, "no such folder to resume", "--resume gone", "checkpoint-N"),
        ({"precision": "fp16"}, "fp16 needs a GPU", "--precision", "bf16"),
        ({"ema": 0.9, "strategy": "zero2"}, "zero2 spreads them", "--ema, --strategy", "ddp"),
        ({"tracker": "wandb"}, "not installed", "--tracker", "pip install wandb"),
        ({"deepspeed": "ds.json", "strategy": "ddp"}, "no meaning", "ds.json", "leave one"),
        (
            {"nvme": Path("fast"), "strategy": "zero3-offload"},
            "no such folder to offload to",
            "--nvme fast",
            "mkdir fast",
        ),
        ({"nvme": Path("fast"), "strategy": "zero2"}, "offloads nothing", "--nvme", "zero3-offload"),
        ({"target_modules": ["to_qq"]}, "no linear layer called 'to_qq'", "--target-modules", "attn1.to_q"),
        ({"target_modules": ["transformer_blocks.99.attn1.to_q"]}, "no linear layer", "--target-modules", "to_q"),
        ({"target_modules": []}, "no layer gets an adapter", "--target-modules", "attn1.to_q"),
        ({"optimizer": "prodigy"}, "finds the rate itself", "--optimizer prodigy, --lr", "--lr 1"),
        ({"optimizer": "prodigy", "lr": 1e3}, "far too much", "--lr", "--lr 1"),
        ({"optimizer": "prodigy", "lr": 1.0, "strategy": "zero1"}, "under zero1 each process", "--strategy", "ddp"),
        ({"optimizer": "prodigy", "lr": 1.0, "strategy": "zero2"}, "under zero2 each process", "--strategy", "ddp"),
        ({"optimizer": "prodigy", "lr": 1.0, "strategy": "zero3"}, "under zero3 each process", "--strategy", "ddp"),
        ({"optimizer": "prodigy", "lr": 1.0, "strategy": "zero2-offload"}, "host memory", "--strategy", "ddp"),
        ({"optimizer": "adamw8bit", "strategy": "zero3-offload"}, "host memory", "--strategy", "without -offload"),
        ({"lr": 1.0}, "a rate of 1 moves every weight", "--lr", "--lr 1e-4"),
        ({"lr": 1e4, "cls": SftSettings}, "a rate of 10000", "--lr", "--lr 1e-5"),
        ({"validate_videos": 2}, "no held-out samples", "--validate-videos", "--validate-shards"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_before_a_weight_is_read(open_here, monkeypatch, options, says, where, fix):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    with pytest.raises(CogError) as caught:
        open_here(**options)
    error = caught.value
    assert says in error.what and where in (error.where or "") and fix in (error.fix or ""), str(error)


def test_a_transformer_that_lacks_a_weight(open_here, tmp_path):
    shutil.copytree(open_checkpoint("tiny").root, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    save_file({name: weights[name] for name in weights if name != first}, path)
    for cls in (LoraSettings, SftSettings):
        with pytest.raises(ModelError, match=f"the transformer of .* lacks 1 weight of its .* the first {first}"):
            open_here(cls=cls, model=str(tmp_path / "model"))


def test_shards_of_another_text_length(open_here, tmp_path):
    for path in (tmp_path / "out").glob("*.parquet"):
        record = read_record(path)
        contract = dataclasses.replace(record.header.contract, text_tokens=224)
        write_record(dataclasses.replace(record, header=dataclasses.replace(record.header, contract=contract)), path)
    with pytest.raises(CogError, match="text length 224, the model has 226"):
        open_here()


def test_held_out_samples_of_a_size_that_the_model_cannot_take(open_here, tmp_path, make_shards):
    make_shards(tmp_path / "val", samples=2)
    for path in (tmp_path / "val").glob("*.parquet"):
        record = read_record(path)
        rows = [dataclasses.replace(row, bucket="97x64x96") for row in record.rows]
        write_record(dataclasses.replace(record, rows=rows), path)
    with pytest.raises(CogError) as caught:
        open_here(validate_shards=["val"])
    assert "samples of 97x64x96" in caught.value.what and "at most 49" in caught.value.what
    assert "val" in caught.value.where and "encode these clips again" in caught.value.fix


def test_what_this_machine_lacks_is_said_before_a_weight_is_read(open_here, monkeypatch):
    run = open_here(optimizer="prodigy", lr=1.0)
    check_ready(run, 1)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(SettingError, match="needs a package"):
        check_ready(run, 1)
    monkeypatch.setattr(trial, "compiler_fault", lambda device: "no gcc")
    with pytest.raises(SettingError, match="no gcc"):
        check_ready(open_here(compile="on"), 1, CPU)


@pytest.fixture
def host_of(monkeypatch):
    """host_of(bytes): what a control group has left of its limit."""

    def make(size):
        monkeypatch.setattr(ready, "host_memory_left", lambda: Headroom(int(size), "the memory limit of box"))
        monkeypatch.setattr(ready, "held_here", lambda: 0)

    return make


def test_host_memory_that_is_not_enough_is_said_once_and_for_all_processes(open_here, host_of):
    run = open_here()
    takes = estimate(run, gpu=False, memory="low").host_at_most(1)
    host_of(2.5 * takes)
    check_ready(run, 2)
    with pytest.raises(RunError, match="for each of 3 processes") as caught:
        check_ready(run, 3)
    assert "--nproc 2," in caught.value.fix and caught.value.where == "the memory limit of box"
    assert "of host memory" in caught.value.what and "are there" in caught.value.what


def test_a_batch_that_the_host_has_no_memory_for_is_refused_with_one_that_it_has(open_here, host_of):
    small, large = (estimate(open_here(batch_size=batch), gpu=False).host_at_most(1) for batch in (1, 2))
    host_of((small + large) / 2)
    with pytest.raises(RunError) as caught:
        check_ready(open_here(batch_size=2, memory="fast"), 1)
    assert "--batch-size 1" in caught.value.fix
    check_ready(open_here(batch_size=1, memory="fast"), 1)


def test_a_tar_that_is_gone_is_said(open_here, tmp_path):
    assert open_here().notes == ()
    (tmp_path / "out" / "000001.tar").unlink()
    (note,) = open_here().notes
    assert "not trained: out/000001.tar" in note


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 1, "epochs": 1}, "both say how long"),
        ({"steps": 0}, "0 is too small"),
        ({"lr": -1.0}, "-1.0 is too small"),
        ({"lr": float("nan")}, "nan is too small"),
        ({"eps": 0.0}, "divided by zero"),
        ({"min_snr_gamma": 0.0, "loss_weighting": "min-snr"}, "every loss would be zero"),
        ({"beta1": 1.0}, "1.0 is too large"),
        ({"caption_dropout": 1.5}, "1.5 is too large"),
        ({"rank": 0}, "0 is too small"),
        ({"lr": float("inf")}, "inf is not a finite number"),
        ({"alpha": float("inf")}, "inf is not a finite number"),
        ({"max_grad_norm": float("inf")}, "inf is not a finite number"),
        ({"alpha": 0.0}, "0.0 is too small"),
        ({"lora_dropout": 1.0}, "1.0 is not a share"),
    ],
)
def test_settings_out_of_range(options, says):
    with pytest.raises(SettingError, match=says):
        LoraSettings(**options)


def file(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "key", "option"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping", "--max-grad-norm"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", "--batch-size"),
        ({"train_batch_size": 64}, "train_batch_size", "--batch-size"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", "--accumulate"),
        ({"bf16": {"enabled": False}}, "bf16.enabled", "--precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "--precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "--strategy"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "--strategy and --nvme",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr", "--lr"),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas", "--beta1, --beta2"),
        ({"optimizer": {"params": {"weight_decay": 0.5}}}, "optimizer.params.weight_decay", "--weight-decay"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "--optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}, "scheduler.", "--lr-schedule"),
    ],
)
def test_a_contradiction_in_a_deepspeed_file_names_both(tmp_path, content, key, option):
    settings = SftSettings(strategy="zero2", deepspeed=file(tmp_path, content))
    with pytest.raises(SettingError) as caught:
        deepspeed_config(settings, "zero2", "bf16", 2)
    message = str(caught.value)
    assert key in message and option in message and "ds.json" in message and '"auto"' in message


def test_a_deepspeed_file_is_merged(tmp_path):
    content = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1234},
        "comms_logger": {"enabled": True},
    }
    settings = SftSettings(deepspeed=file(tmp_path, content), batch_size=2, accumulate=3)
    assert choose_strategy(settings, full=True, gpus=0) == "zero2"  # the file says it
    merged = deepspeed_config(settings, "zero2", "bf16", 4)
    assert merged["train_batch_size"] == 24 and merged["bf16"] == {"enabled": True}
    assert merged["zero_optimization"]["reduce_bucket_size"] == 1234
    assert merged["zero_optimization"]["overlap_comm"] is False and merged["comms_logger"] == {"enabled": True}
    assert "optimizer" not in merged and "scheduler" not in merged


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"zero_optimization": 2}, "zero_optimization = 2 is no section"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'offload_optimizer = "cpu" is no section'),
        ({"bf16": True, "zero_optimization": {"stage": 2}}, "bf16 = true is no section"),
        ({"zero_optimization": {"stage": 2, "offload_param": None}, "bf16": None, "optimizer": "auto"}, ""),
    ],
)
def test_sections_of_a_deepspeed_file(tmp_path, content, says):
    settings = SftSettings(deepspeed=file(tmp_path, content))
    if not says:
        assert choose_strategy(settings, full=True, gpus=0) == "zero2"
        assert deepspeed_config(settings, "zero2", "fp32", 1)["bf16"] == {"enabled": False}
        return
    with pytest.raises(SettingError, match=says):
        choose_strategy(settings, full=True, gpus=0)


@pytest.mark.parametrize(
    ("content", "says"), [("{", "not a DeepSpeed"), ("[]", "not a DeepSpeed"), (None, "cannot read")]
)
def test_a_deepspeed_file_that_is_none(tmp_path, content, says):
    path = tmp_path / "ds.json" if content is None else file(tmp_path, content)
    with pytest.raises(SettingError, match=says):
        deepspeed_config(SftSettings(deepspeed=path), "zero2", "bf16", 1)


@pytest.mark.parametrize(
    ("slip", "meant"), [("zero_optimisation", "zero_optimization"), ("gradient_cliping", "gradient_clipping")]
)
def test_a_key_that_deepspeed_would_skip_is_named(tmp_path, slip, meant):
    with pytest.raises(SettingError, match=f"no key '{slip}'") as caught:
        deepspeed_config(SftSettings(deepspeed=file(tmp_path, {slip: 1})), "zero2", "bf16", 1)
    assert caught.value.fix == f"write '{meant}'"


def test_auto_strategy():
    lora, sft = LoraSettings(), SftSettings()
    assert choose_strategy(lora, full=False, gpus=8) == "ddp"
    assert [choose_strategy(sft, full=True, gpus=gpus) for gpus in (0, 1, 8)] == ["ddp", "ddp", "zero2"]
    assert choose_strategy(SftSettings(strategy="zero3"), full=True, gpus=1) == "zero3"


def test_nvme_goes_into_the_dict(tmp_path):
    zero = deepspeed_config(SftSettings(nvme=tmp_path), "zero3-offload", "bf16", 1)["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        assert zero[part]["device"] == "nvme" and zero[part]["nvme_path"] == str(tmp_path)
    assert zero["offload_param"]["buffer_count"] > 2 * 8  # this block's large weights, and the next one's


def test_a_run_folder_that_cannot_be_written(tmp_path, make_shards, train_here):
    make_shards(tmp_path / "out", samples=2)
    (tmp_path / "file").write_text("")
    settings = LoraSettings(shards=[str(tmp_path / "out")], steps=1, rank=2, out=tmp_path / "file" / "run")
    with pytest.raises(DiskError, match="is a file, not a folder"):
        train_here(settings)
