"""Host memory that is locked for a GPU: on pages of its own, given back, and a refusal that nobody else hears of."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from cogtrain.offload import pinned
from cogtrain.offload.pinned import locked_bytes, page_locked, unlock

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = (1 << 20, (1 << 20) + 1, 3_000_001)


class Driver:
    """Locks pages as a CUDA driver does: none twice."""

    def __init__(self):
        self.pages = {}

    def cudaHostRegister(self, address, size, flags):
        assert address % 4096 == 0 and size % 4096 == 0
        pages = range(address // 4096, (address + size) // 4096)
        if any(page in held for held in self.pages.values() for page in pages):
            return 712
        self.pages[address] = pages
        return 0

    def cudaHostUnregister(self, address):
        del self.pages[address]


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinned, "_locked", {})
    return driver


def test_no_page_is_locked_twice_and_all_of_it_is_given_back(driver):
    given = [page_locked(size, GPU) for size in SIZES * 3]
    assert [tensor.numel() for tensor in given] == [*SIZES] * 3
    assert all(tensor.data_ptr() in driver.pages for tensor in given)
    assert locked_bytes() == 3 * sum(SIZES)
    for tensor in given[1:]:
        unlock(tensor)
    assert locked_bytes() == SIZES[0] and [*driver.pages] == [given[0].data_ptr()]
    given[1].fill_(7)  # still memory


def test_on_a_cpu_it_is_ordinary_memory(driver):
    given = page_locked(SIZES[0], CPU)
    unlock(given)
    assert given.numel() == SIZES[0] and not driver.pages and locked_bytes() == 0


@pytest.mark.gpu  # only a driver keeps its errors
@pytest.mark.parametrize("refuses", [False, True])
def test_the_next_kernel_does_not_hear_of_a_refusal(monkeypatch, refuses):
    real = torch.cuda.cudart()

    def twice(address, size, flags):
        assert int(real.cudaHostRegister(address, size, flags)) == 0
        refused = real.cudaHostRegister(address, size, flags)  # it is locked
        assert int(refused) != 0
        real.cudaHostUnregister(address)
        return refused

    if refuses:
        named = SimpleNamespace(cudaHostRegister=twice, cudaHostUnregister=real.cudaHostUnregister)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: named)
    given = [page_locked(size, GPU) for size in (100, 5000, *SIZES)]
    x = torch.arange(1000, device=GPU).float()
    for tensor in given:
        # Told by the driver, which locks no page twice: torch 2.11 knows only what its own allocator locked.
        assert tensor.is_pinned() or int(real.cudaHostRegister(tensor.data_ptr(), 4096, 0)) != 0
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=GPU)  # hears of that refusal
        numbers = tensor[: tensor.numel() // 4 * 4].view(torch.float32)
        n = min(numbers.numel(), 1000)
        numbers[:n].copy_(x[:n] * 2)
        assert torch.equal(numbers[:n].to(GPU), x[:n] * 2)
        unlock(tensor)
