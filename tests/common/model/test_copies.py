"""Weights arrive on a device as they were, shared ones shared, and come back as copies of their own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogcommon.model.copies import downloaded, move


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
    before, called = dict(module.named_parameters()), []
    move(module, torch.device(kind), {id(module.inner["narrow"])}, lambda: called.append(kind))
    assert called == [kind] * (kind == "cuda")  # while threads copy
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert module.again is module.inner["odd"] and module.inner["narrow"].device.type == "cpu"
    assert {module.inner[name].device.type for name in ("large", "odd", "one")} == {kind}
    assert (module.strided.device.type, module.table.device.type) == (kind, kind)
    assert all(torch.equal(module.inner[name].cpu(), value) for name, value in values.items())
    assert torch.equal(module.strided.cpu(), torch.arange(12.0).reshape(3, 4).t())


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_those_of_the_moment_and_nobody_elses(kind):
    """On a GPU in pieces of page-locked memory, some of which is used again and again, behind what is queued."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(kind)

    late = normal(512, 512)
    for _ in range(200 if kind == "cuda" else 2):  # queued, and not computed yet when the copies are asked for
        late = late @ late
        late = late / late.norm()
    weight = torch.nn.Parameter(normal(15 << 20 if kind == "cuda" else 1 << 18))
    tensors = [
        late, weight, weight, normal(300, 999).bfloat16(), normal(1 << 20)[1 << 19 :], normal(400, 500).t(), normal(7),
        normal(), normal(0, 3), torch.arange(1 << 17, device=kind) % 2 == 0, torch.arange(1 << 17, device=kind),
    ]  # fmt: skip
    expected = [tensor.detach().clone() for tensor in tensors]
    found = downloaded(tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    places = [copy.data_ptr() for copy in found if copy.numel()]
    assert len({*places}) == len(places)
    for copy, wanted in zip(found, expected, strict=True):
        assert (copy.device.type, copy.dtype, copy.requires_grad) == ("cpu", wanted.dtype, False)
        assert torch.equal(copy, wanted.cpu())
