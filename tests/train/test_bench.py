"""The benchmark itself, on shapes of seconds: its random weights, its rows, its account of the memory."""

import dataclasses

import pytest
import torch

from cogtrain.bench.allocations import at_the_peak, held
from cogtrain.bench.measure import _After, _Enough, prepare, product, reference
from cogtrain.bench.rows import Row, table
from cogtrain.bench.subject import random_checkpoint


def test_random_weights_are_of_their_variance_and_no_two_the_same():
    shape = {"num_layers": 2, "num_attention_heads": 8, "attention_head_dim": 16, "text_embed_dim": 32}
    transformer = random_checkpoint("5b", shape).load_transformer(torch.float32)
    matrices = [parameter for parameter in transformer.parameters() if parameter.ndim > 1]
    for matrix in matrices:
        if matrix.numel() > 4000:
            assert matrix.std().item() * matrix[0].numel() ** 0.5 == pytest.approx(1, rel=0.05)
    first = [tuple(matrix.flatten()[:4].tolist()) for matrix in matrices]
    assert len(set(first)) == len(first) > 20


@pytest.mark.parametrize("family", ["5b", "5b-i2v"])
def test_a_row_is_measured_on_a_small_shape(family):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # this process may have made other runs
    found = []
    for kind in ("low", "reference"):
        row = Row(family, kind, rank=4, steps=3, small=True, compile="off")
        run = prepare(row)
        early = []
        result = reference(run, row) if kind == "reference" else product(run, row, early.append)
        assert [dict(result)] == early or kind == "reference"
        found.append(dataclasses.asdict(row) | {"bucket": str(row.bucket)} | dict(result))
    low, plain = found
    # The same samples, noise and weights: bf16 computed in two ways.
    assert low["losses"] == pytest.approx(plain["losses"], rel=0.01) and len(low["losses"]) == 3
    assert low["s_per_step"] > 0 and low["locked_gib"] >= 0 and low["peak_gib"] > 0
    assert table(found).count(f"| {family} r4 ") == 2


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

    ours, torchs = frame("/x/train/step/block.py", 7), frame("/x/torch/nn/functional.py", 9)
    events = [
        alloc(100, 4, torchs, ours), free(100),  # 7 at once
        alloc(200, 5, ours), alloc(300, 6, ours), free(11 * mib), alloc(400, 1, torchs), free(300), free(200),  # 14
        alloc(500, 3, torchs), free(0),
    ]  # fmt: skip
    assert at_the_peak(before, events) == [
        "     14.0 MiB at the peak",
        "     11.0 MiB     2 x work (step/block.py:7)",
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
            self.began = after._made

        def end(self):
            return [f"steps {self.began + 1} to {after._made}"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    after = _After(3, lambda: None, profile=False, trace=False)
    after._more = [Broken(), Two()]
    with pytest.raises(_Enough):
        for step in range(4, 99):
            after._made = step
            after._look()
    assert after.found == {"broken": ["RuntimeError: not allowed here"], "two": ["steps 6 to 7"]} and step == 7
