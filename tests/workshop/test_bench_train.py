"""The benchmark itself, on shapes of seconds: its random weights, its rows, its account of the memory."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from cogtrain.memory.measured import measured
from workshop.bench_train import __main__ as bench
from workshop.bench_train import machine, records
from workshop.bench_train.achieved import achieved, step_flop
from workshop.bench_train.allocations import at_the_peak, held
from workshop.bench_train.measure import _Enough, _Steps, prepare, product
from workshop.bench_train.plain import reference
from workshop.bench_train.reference_guide import guide_rows
from workshop.bench_train.rows import BenchRow, guide_row, rows_named, table
from workshop.bench_train.subject import random_checkpoint


def test_random_weights_are_of_their_variance_and_no_two_the_same():
    shape = {"num_layers": 2, "num_attention_heads": 8, "attention_head_dim": 16, "text_embed_dim": 32}
    transformer = random_checkpoint("5b", shape).load_transformer(torch.float32)
    matrices = [parameter for parameter in transformer.parameters() if parameter.ndim > 1]
    for matrix in matrices:
        if matrix.numel() > 4000:
            assert matrix.std().item() * matrix[0].numel() ** 0.5 == pytest.approx(1, rel=0.05)
    first = [tuple(matrix.flatten()[:4].tolist()) for matrix in matrices]
    assert len(set(first)) == len(first) > 20


def changed(row, **changes):
    return dataclasses.replace(row, **{"small": True, "compile": "off", "steps": 3} | changes)


@pytest.mark.parametrize(
    "row",
    [BenchRow("5b", "low", rank=4), BenchRow("5b-i2v", "low", rank=4), guide_row(4, "low")],
    ids=lambda row: row.name,
)
def test_a_row_is_measured_on_a_small_shape(row):
    from accelerate.state import AcceleratorState

    found = []
    for kind in ("low", "reference"):
        AcceleratorState._reset_state(reset_partial_state=True)  # this process may have made other runs
        row = changed(row, kind=kind)
        run = prepare(row)
        assert machine.lacking(run) is None
        early = []
        result = reference(run, row) if kind == "reference" else product(run, row, early.append)
        assert [dict(result)] == early or kind == "reference"
        found.append(dataclasses.asdict(row) | {"bucket": str(row.bucket)} | dict(result))
    low, plain = found
    # The same samples, noise and weights: bf16 computed in two ways.
    assert low["losses"] == pytest.approx(plain["losses"], rel=0.01) and len(low["losses"]) == 3
    assert low["s_per_step"] > 0 and low["locked_gib"] >= 0 and low["peak_gib"] > 0
    assert low["block_plan"]["offload_activations"] and plain["plan"].startswith("every block checkpointed")
    assert (low["block_plan"]["train_on_cpu"] > 0) == (row.number == 4)
    *_, of_low, of_plain = table(found).splitlines()
    assert "% in 3 steps" in of_low and "| 1.00 | 0.00% in 3 steps |" in of_plain


def test_rows_of_the_guide_are_its_files():
    rows = guide_rows()
    given = [row.guide_gb for row in rows.values()]
    assert given == [16, 24, 35, 36, 17, 17, 19, 14, 42, 42, 43, 28, 56, 55, 55, 40, 24]
    assert [row.name for row in rows_named(["9"])] == ["09/low", "09/auto", "09/file", "09/reference"]
    low, _, file, reference = rows_named(["09"])
    assert (low.settings.strategy, low.settings.memory) == ("ddp", "low")
    assert file.settings == reference.settings == rows[9].settings and file.settings.strategy == "zero2-offload"
    assert low.command == (
        "cogtrain sft --config configs/09-5b-sft-zero2-offload-1gpu.toml --strategy ddp --memory low --shards out/*.tar"
    )
    (eight,) = rows_named(["10/auto"])
    assert eight.settings == rows[10].settings and eight.processes_of(2) == 2
    assert dataclasses.replace(eight, processes=2).shown == "10/auto on 2 of 8 GPUs"
    assert rows_named(["5b/low", "2b/low"])[1].family == "2b" and rows_named(["1/low"])[0].settings.precision == "fp16"
    with pytest.raises(ValueError, match="no row is called 18; there are 5b/low"):
        rows_named(["18"])


def test_a_row_for_which_the_host_has_no_memory_is_left_out(monkeypatch):
    run = prepare(changed(guide_row(9, "file"), steps=1))
    config = random_checkpoint("5b").transformer_config
    large = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, transformer_config=config))
    monkeypatch.setattr(machine, "free_host_memory", lambda: 64 * 2**30)
    # 8 bytes a weight for the moments, and 32, 32 and 16 GiB: what torch page-locks is a power of two.
    needed = {pinned: machine.lacking(large, pinned) for pinned in (True, False)}
    assert needed[True].startswith("126 GiB of host memory needed") and needed[False].startswith("97 GiB")
    assert machine.lacking(dataclasses.replace(large, strategy="ddp")) is None


def test_what_was_measured_on_a_gpu_is_kept_once(tmp_path, monkeypatch):
    row = dataclasses.asdict(guide_row(9, "low")) | {
        "row": "09/low", "command": "cogtrain sft", "bucket": "49x480x720", "date": "2026-01-01", "method": "sft",
        "precision": "bf16", "strategy": "ddp", "memory": "low", "plan": "as planned", "gpu": "H100", "card_gib": 79.2,
        "attention": "cudnn",
        "s_per_step": 3.0, "peak_gib": 11.0, "first_peak_gib": 12.0, "host_gib": 90.0, "locked_gib": 70.0,
        "compile_s": 9.0, "losses": [2.0, 1.5], "versions": {"torch": "2.11"},
    }  # fmt: skip
    lines = [row, row, row | {"small": True}, row | {"gpu": "CPU"}, {"small": False, "failed": "exit 1"}]
    lines.append(row | {"row": "07/reference", "kind": "reference", "all_s": [5.6, 6.7, 1.6], "steps": 2})
    lines.append(row | {"row": "09/reference", "kind": "reference"})
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    added = []
    monkeypatch.setattr(records, "add_measured_run", added.append)
    assert records.add_measured(tmp_path / "bench.jsonl") == 2
    ours, plain = added
    assert ours.peak_gib == 12.0 and ours.rank is None and (ours.memory, plain.memory) == ("low", "reference")
    assert plain.command == "python -m workshop.bench_train 09/reference" and ours.losses == (2.0, 1.5)
    added.clear()
    assert records.add_measured(tmp_path / "bench.jsonl", "abc1234") == 2 and added[0].commit == "abc1234"


@pytest.mark.full  # half a minute: two processes a row, and DeepSpeed
def test_rows_of_several_processes(tmp_path):
    words = ["10/auto", "10/reference", "--small", "--compile", "off", "--gpus", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "workshop.bench_train", *words], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, plain = (json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines())
    assert ours["processes"] == plain["processes"] == 2 and ours["strategy"] == plain["strategy"] == "zero2"
    assert "failed" not in ours | plain and "10/auto on 2 of 8 GPUs" in done.stdout
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=0.1)  # of both processes' samples, and of one's


def test_what_is_held_at_the_peak_is_told_by_place():
    mib = 2**20
    segments = [
        {
            "address": 0,
            "blocks": [
                {"state": "active_allocated", "size": 2 * mib},
                {"state": "inactive", "size": 9 * mib},
                {"state": "active_allocated", "size": 1 * mib},
            ],
        }
    ]
    before = held(segments)
    assert before == {0: 2 * mib, 11 * mib: 1 * mib}

    def frame(file, line):
        return {"name": "work", "filename": file, "line": line}

    def alloc(address, size, *frames):
        return {"action": "alloc", "addr": address, "size": size * mib, "frames": frames}

    def free(address):
        return {"action": "free_completed", "addr": address}

    ours, torchs = frame("/x/train/blocks/block.py", 7), frame("/x/torch/nn/functional.py", 9)
    events = [
        alloc(100, 4, torchs, ours), free(100),  # 7 at once
        alloc(200, 5, ours), alloc(300, 6, ours), free(11 * mib), alloc(400, 1, torchs), free(300), free(200),  # 14
        alloc(500, 3, torchs), free(0),
    ]  # fmt: skip
    assert at_the_peak(before, events) == [
        "     14.0 MiB at the peak",
        "     11.0 MiB     2 x work (blocks/block.py:7)",
        "      3.0 MiB     2 x held before the step",
    ]
    assert at_the_peak({}, [alloc(1, 2, ours)])[0].strip() == "2.0 MiB at the peak"


def test_what_is_looked_at_after_the_measurement_fails_alone(monkeypatch):
    class Broken:
        name, steps = "broken", 1

        def begin(self):
            raise RuntimeError("not allowed here")

    class Two:
        name, steps = "two", 2

        def begin(self):
            self.began = step

        def end(self):
            return [f"steps {self.began + 1} to {step}"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    steps = _Steps(3, lambda: None, profile=False, trace=False)
    steps._more = [Broken(), Two()]
    with pytest.raises(_Enough):
        for step in range(4, 99):
            steps._look(step)
    assert steps.found == {"broken": ["RuntimeError: not allowed here"], "two": ["steps 6 to 7"]} and step == 7


def test_a_step_of_5b_computes_what_the_design_counts():
    assert step_flop("5b", "lora", "49x480x720") == pytest.approx(909e12, rel=1e-3)
    more = step_flop("5b", "sft", "49x480x720") - step_flop("5b", "lora", "49x480x720")
    assert more == pytest.approx(42 * 24 * 17776 * 3072**2)  # gradients of the weights, too
    (fast,) = [run for run in measured() if run.row == "5b/fast" and run.attention == "flash4"][:1]
    assert str(achieved(fast)) == "526, 53%"


@pytest.fixture
def as_known(monkeypatch):
    """The newest result of 5b/fast with cuDNN that is known, as the benchmark would find it again; and that itself."""
    monkeypatch.setattr(records, "_commit", lambda: "now")
    known = next(run for run in measured() if (run.row, run.attention) == ("5b/fast", "cudnn"))
    row = rows_named(["5b/fast"])[0]
    return dataclasses.asdict(row) | dataclasses.asdict(known) | {"bucket": known.resolution, "processes": 1}, known


def test_a_check_says_by_how_much_a_row_has_moved(as_known, capsys):
    result, known = as_known
    row = rows_named(["5b/fast"])[0]

    def check(**changes):
        worse = bench._worse([row], [result | changes])
        return worse, capsys.readouterr().out, records.compared_table([result | changes]).splitlines()[-1]

    worse, said, line = check()
    then = f"{known.s_per_step:.2f} ({known.date}, {known.commit}) | +0.0% | {known.peak_gib:.1f} | +0.0% |"
    assert not worse and said == "none is slower by more than 3%\n"
    assert line.startswith(f"| 5b/fast, cuDNN | {known.s_per_step:.2f} | {achieved(known)} | {then}")
    assert line.endswith("% |")
    worse, said, line = check(s_per_step=known.s_per_step * 1.05)
    assert worse and said == "slower by more than 3%: 5b/fast\n" and "| +5.0% |" in line
    assert not check(s_per_step=known.s_per_step * 1.02)[0]
    worse, said, line = check(gpu="another card")
    assert not worse and "| never |" in line and said == "nothing to compare with is recorded of: 5b/fast\n"
    slow = dataclasses.asdict(row) | {"row": "5b/fast", "failed": "exit 1: no memory"}
    assert bench._worse([row, row], [slow]) and capsys.readouterr().out == "failed: 5b/fast\nnot reached: 5b/fast\n"
    assert records.compared_table([slow]).endswith("| 5b/fast | exit 1: no memory |")
    worse, said, line = check(all_s=[9.0, 1.9, 3.0, 2.0], steps=3)  # the second step under ZeRO-3, say
    assert "5b/fast" in said and "not settled: its steps took 1.90 to 3.00 s" in line


def test_losses_of_the_same_random_weights_are_compared_with_what_they_were(as_known, monkeypatch):
    result, known = as_known
    then = dataclasses.replace(known, losses=(1.0, 2.0))
    monkeypatch.setattr(records, "everything_measured", lambda: (then,))
    assert records.compared(result | {"losses": []}).losses_off is None
    assert records.compared(result | {"losses": [1.0, 2.02, 9.0]}).losses_off == pytest.approx(0.01)


def test_a_row_on_a_slower_link_stands_beside_its_like_and_what_plan_says_of_that_link(as_known):
    result, _ = as_known
    low = next(run for run in measured() if run.row == "5b/low")
    result |= dataclasses.asdict(low) | {"bucket": low.resolution, "kind": "low", "link": 5.0}  # never measured
    found = records.compared(result)
    own = records.compared(result | {"link": None})
    assert found.since is None and own.since == low  # a run on its machine's own link says nothing of this one
    # 42 blocks: weights of 10 GB twice and what is kept once come from the host, less what two blocks find there.
    assert 5.4 < found.planned_s < 6.6 and own.planned_s < 2.3
    assert str(found).startswith("| 5b/low at 5 GB/s, cuDNN |")
    assert records._measured(result).link == 5.0


def test_what_a_benchmark_cannot_hold_to_a_link_is_refused(monkeypatch, tmp_path):
    rows = {row.name: row for row in rows_named(["5b", "09", "10/auto"])}
    ours = {"5b/low", "5b/fast", "5b/auto", "09/low", "09/auto", "10/auto"}
    assert {name for name, row in rows.items() if row.copies_by_us} == ours
    monkeypatch.setattr("cogcommon.model.device.visible_gpus", lambda: 0)
    for words, said in (("5b/low", "no GPU here"), ("5b/reference", "not ours are those of: 5b/reference")):
        done = CliRunner().invoke(bench.app, [words, "--link", "12", "--out", str(tmp_path)])
        assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())


def test_every_recorded_run_says_on_what_it_was_measured_and_how():
    from cogtrain.memory.measured import everything_measured

    for run in everything_measured():
        assert run.gpu and run.versions["torch"] and run.command and run.commit and run.date and run.attention, run
