"""`copies.move` leaves every weight as it was, shared ones shared."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.model.copies import move


def module_over(file):
    """A module whose weights lie in a file, one of them in two places; some end in the middle of a piece."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"large": (5, 7 << 20), "odd": (3, 5), "one": (), "narrow": (1 << 10, 33)}
    values = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    values["narrow"] = values["narrow"].bfloat16()
    save_file(values, file)
    module = torch.nn.Module()
    module.inner = torch.nn.ParameterDict(load_file(file))
    module.again = module.inner["odd"]
    module.strided = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    module.register_buffer("table", torch.arange(5))
    return module, values


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_arrive_as_they_were(tmp_path, kind):
    module, values = module_over(tmp_path / "weights.safetensors")
    before = dict(module.named_parameters())
    move(module, torch.device(kind), stay={id(module.inner["narrow"])})
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert module.again is module.inner["odd"] and module.inner["narrow"].device.type == "cpu"
    assert {module.inner[name].device.type for name in ("large", "odd", "one")} == {kind}
    assert (module.strided.device.type, module.table.device.type) == (kind, kind)
    assert all(torch.equal(module.inner[name].cpu(), value) for name, value in values.items())
    assert torch.equal(module.strided.cpu(), torch.arange(12.0).reshape(3, 4).t())
