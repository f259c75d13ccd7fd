import json

import torch

from cogtrain.pretrain.fit import fit, one_cycle
from cogtrain.pretrain.muon import orthogonal


def batch_at(step):
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(step))


def run(folder, steps, stop=None, workers=0):
    """A small regression; stopped by an exception at a step, as a kill would."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))

    def losses_of(x, step):
        if step == stop:
            raise KeyboardInterrupt
        return {"loss": (model(x) - x[:, :4].sin()).square().mean()}

    try:
        fit(model, batch_at, losses_of, folder, steps=steps, lr=0.01, workers=workers, save_every=50)
    except KeyboardInterrupt:
        assert stop is not None
    return model


def test_a_resumed_run_is_the_run(tmp_path):
    whole = run(tmp_path / "a", 300)
    run(tmp_path / "b", 300, stop=170)
    resumed = run(tmp_path / "b", 300, workers=1)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200, 300]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [one_cycle(step, 1000) for step in range(1001)]
    assert max(rates) == 1 and rates[0] < 0.05 and rates[-1] < 1e-4
    assert rates.index(max(rates)) in (49, 50)


def test_an_orthogonal_step_has_singular_values_near_one():
    matrix = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    for m in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonal(m))
        assert values.min() > 0.6 and values.max() < 1.3
