"""The processes of torch's compiler end beside a run's export, and a run that follows gets others."""

import operator

import pytest

from cogtrain.blocks.compiler import end_workers


@pytest.mark.full  # they import torch
def test_a_run_that_follows_in_this_process_gets_compilers_of_its_own(monkeypatch):
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(config, "compile_threads", 2)
    first = AsyncCompile.process_pool()
    assert first.submit(operator.add, 1, 2).result(120) == 3
    end_workers()
    second = AsyncCompile.process_pool()
    assert second.submit(operator.add, 3, 4).result(120) == 7
    assert first.process.wait(60) == 0
    end_workers()
    assert second.process.wait(60) == 0


def test_nothing_is_ended_where_nothing_was_compiled():
    end_workers()
