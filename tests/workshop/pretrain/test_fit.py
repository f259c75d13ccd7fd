import json
import time

import torch

from workshop.pretrain.fit import fit, one_cycle
from workshop.pretrain.muon import orthogonal


def inputs_at(step, progress):
    return (torch.randn(32, 8, generator=torch.Generator().manual_seed(step)),)


def run(folder, stop=None, save_seconds=1e9, **length):
    """A small regression; stopped by an exception at a step, as a kill would."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
    )
    called = 0

    def losses_of(x):
        nonlocal called
        called += 1
        if called == stop:
            raise KeyboardInterrupt
        return {"loss": (model(x) - x[:, :4].sin()).square().mean()}

    try:
        fit(model, inputs_at, losses_of, folder, lr=0.01, save_seconds=save_seconds, **length)
    except KeyboardInterrupt:
        assert stop is not None
    return model


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_run(tmp_path):
    whole = run(tmp_path / "a", steps=300)
    run(tmp_path / "b", stop=170, save_seconds=0, steps=300)
    assert lines(tmp_path / "b")[-1]["step"] == 169
    resumed = run(tmp_path / "b", steps=300)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [line["step"] for line in lines(tmp_path / "a")] == [100, 200, 300]
    assert lines(tmp_path / "a")[-1]["loss"] < 0.7 * lines(tmp_path / "a")[0]["loss"]


def test_a_run_ends_in_time_and_goes_on_with_what_is_left(tmp_path):
    run(tmp_path, stop=40, save_seconds=0, minutes=10)
    state = torch.load(tmp_path / "state.pt")
    torch.save({**state, "seconds": 10 * 60 - 1}, tmp_path / "state.pt")
    started = time.monotonic()
    run(tmp_path, minutes=10)
    assert time.monotonic() - started < 20
    assert torch.load(tmp_path / "state.pt")["step"] > state["step"]


def test_the_weights_left_are_the_average_of_the_last_ones(tmp_path):
    model = run(tmp_path, steps=200)
    last = torch.load(tmp_path / "state.pt")["model"]
    offs = [float((p.detach() - last[name]).abs().max()) for name, p in model.named_parameters()]
    assert 0 < max(offs) < 0.05


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [one_cycle(step, step / 1000) for step in range(1001)]
    assert max(rates) > 0.98 and rates[0] < 0.05 and rates[-1] < 1e-4
    assert rates.index(max(rates)) in (49, 50)


def test_an_orthogonal_step_has_singular_values_near_one():
    matrix = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    stack = torch.stack([matrix, 9 * matrix.flip(0)])
    for m in (matrix, matrix.T, stack):
        values = torch.linalg.svdvals(orthogonal(m))
        assert values.min() > 0.6 and values.max() < 1.3
