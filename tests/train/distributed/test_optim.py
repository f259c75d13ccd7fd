import itertools
import math
import subprocess
import sys
import types

import pytest
import torch

from cogcommon.cli import progress
from cogcommon.errors import SettingError
from cogtrain.distributed.optimizer import (
    check_optimizer,
    check_optimizer_installed,
    learning_rate,
    make_optimizer,
    warmup_steps,
)
from cogtrain.settings.training import LoraSettings, SftSettings

CPU = torch.device("cpu")


def rates(steps, **options):
    settings = LoraSettings(lr=1.0, **options)
    return [learning_rate(step, steps, settings) for step in range(1, steps + 1)]


def test_defaults_and_the_length_of_the_warm_up():
    lora, sft = LoraSettings(), SftSettings()
    assert (lora.lr, sft.lr) == (1e-4, 1e-5)
    assert (lora.beta1, lora.beta2, lora.eps, lora.weight_decay, lora.max_grad_norm) == (0.9, 0.95, 1e-8, 1e-4, 1.0)
    assert [warmup_steps(lora, steps) for steps in (5, 50, 500, 5000)] == [0, 5, 50, 100]
    assert warmup_steps(LoraSettings(warmup=200), 300) == 200


def test_schedules_count_steps_and_end_at_zero():
    assert rates(5) == [1.0] * 5
    for schedule in ("linear", "cosine"):
        found = rates(100, lr_schedule=schedule, warmup=10)
        assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert found[-1] == 0 and all(a > b for a, b in itertools.pairwise(found[9:]))
    assert rates(100, lr_schedule="cosine", warmup=0)[49] == pytest.approx(0.5)
    assert rates(100, lr_schedule="cosine", warmup=0)[24] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_every_setting_is_in_the_optimizer():
    settings = LoraSettings(lr=0.1, beta1=0.5, beta2=0.6, eps=1e-3, weight_decay=0.7)
    for name in ("adamw", "prodigy"):
        chosen = LoraSettings(**{**vars(settings), "optimizer": name})
        optimizer = make_optimizer([torch.nn.Parameter(torch.ones(2))], chosen, CPU, offload_optimizer=False)
        group = optimizer.param_groups[0]
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (0.1, (0.5, 0.6), 1e-3, 0.7)


def test_prodigy_wants_its_own_rate():
    with pytest.raises(SettingError, match="finds the rate itself") as caught:
        check_optimizer(LoraSettings(optimizer="prodigy"), "ddp")
    assert caught.value.fix == "--lr 1"


def test_prodigy_trains(tmp_path, make_shards, train_here, losses):
    make_shards(tmp_path / "out", samples=2)
    settings = LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / "run", steps=2, rank=2, lr=1.0)
    run = train_here(LoraSettings(**{**vars(settings), "optimizer": "prodigy"}))
    assert len(losses(run)) == 2


def test_a_missing_package_is_named(monkeypatch):
    for package in ("bitsandbytes", "torchao", "prodigyopt"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    for optimizer, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        with pytest.raises(SettingError, match="not installed") as caught:
            check_optimizer_installed(optimizer, "ddp")
        assert f"pip install {package}" in caught.value.fix


def test_torchao_is_refused_where_its_8_bits_save_nothing(monkeypatch):
    """A stand for the package, which is large: what is asked is where its class says that it comes from."""
    there = types.ModuleType("torchao.optim")
    there.AdamW8bit = type("AdamW8bit", (), {"__module__": "torchao.optim.adam"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", there)
    check_optimizer_installed("adamw8bit", "ddp")
    with pytest.raises(SettingError, match="save no memory under zero2") as caught:
        check_optimizer_installed("adamw8bit", "zero2")
    assert caught.value.fix.startswith("pip install bitsandbytes")


def test_only_adamw_steps_in_host_memory():
    with pytest.raises(SettingError, match="does not step in host memory"):
        check_optimizer(SftSettings(optimizer="adamw8bit"), "zero2-offload")


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch):
    from deepspeed.ops.adam import cpu_adam

    class NoCompiler:
        def load(self):
            raise RuntimeError("Unable to JIT load the cpu_adam op\nand a page of it")

    monkeypatch.setattr(cpu_adam, "CPUAdamBuilder", NoCompiler)
    with pytest.raises(SettingError) as caught:
        make_optimizer([torch.nn.Parameter(torch.ones(2))], SftSettings(), CPU, offload_optimizer=True)
    assert caught.value.what.endswith("Unable to JIT load the cpu_adam op")
    assert "g++" in caught.value.fix and "--memory low" in caught.value.fix


def test_a_build_that_was_killed_does_not_stop_the_next(tmp_path, monkeypatch):
    """torch's own lock file: taken away when its process is dead, left alone while it lives."""
    from cogtrain.distributed.zero import compiling_alone

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    script = f"import sys; from torch.utils.file_baton import FileBaton; FileBaton({str(lock)!r}).try_acquire(); "
    builder = subprocess.Popen(
        [sys.executable, "-c", script + "print('building', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert builder.stdout.readline() == b"building\n"
        with compiling_alone():
            assert lock.exists()
    finally:
        builder.kill()
        builder.communicate()
    assert lock.exists()
    with compiling_alone():
        assert not lock.exists()


def test_a_folder_that_cannot_be_written_is_left_to_who_compiles(tmp_path, monkeypatch):
    from cogtrain.distributed.zero import compiling_alone

    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    shown = []
    with compiling_alone():
        shown += [one.name for one in progress._display.stages]
    assert shown == ["compiling an optimizer for host memory, once"]  # minutes, of which one must know what they are
