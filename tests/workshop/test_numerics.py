"""The benchmark's numerics row: gradients of every weight beside fp32's, and nothing escapes it."""

import pytest
import torch

from workshop.bench_train import numerics as subject
from workshop.bench_train.numerics import numerics
from workshop.bench_train.rows import BenchRow


def test_no_gradient_is_farther_from_fp32_than_bf16_is(monkeypatch):
    monkeypatch.setattr(subject, "compiler_fault", lambda device: "not asked for")
    found = numerics(BenchRow("5b", "numerics", small=True), torch.device("cpu"))["numerics"]
    assert {name.split(",")[0] for name in found} == {"LoRA", "SFT"} and len(found) == 8
    for name, errors in found.items():
        assert 1e-4 < errors["gradients"] < 0.02 and max(errors["worst"].values()) < 0.05, name


def test_one_wrong_gradient_is_named():
    right = {
        "transformer_blocks.0.norm1.linear.bias": torch.ones(4),
        "transformer_blocks.1.norm1.linear.bias": torch.ones(4),
    }
    got = right | {"transformer_blocks.1.norm1.linear.bias": torch.ones(4) * 3}
    errors = subject._against(subject._Found(1.0, right), subject._Found(1.0, got))
    assert errors["worst"] == {"norm1.linear.bias": 2.0} and errors["gradients"] == pytest.approx(2**0.5)
    got["transformer_blocks.1.norm1.linear.bias"] = torch.full((4,), torch.nan)
    assert not subject._against(subject._Found(1.0, right), subject._Found(1.0, got))["worst"]["norm1.linear.bias"] < 9


@pytest.mark.gpu
def test_compiled_gradients_of_all_weights_are_right_at_full_size():
    """A compiler's fusion spoils those of the modulations over 16,000 tokens (`compiler._options`)."""
    for name, errors in numerics(BenchRow("5b", "numerics"), torch.device("cuda"))["numerics"].items():
        assert errors["gradients"] < 0.02 and max(errors["worst"].values()) < 0.05, (name, errors)
