"""Verdicts of trials on the GPU: kept while nothing that they depend on has changed, and never a failure."""

import json

import pytest
import torch

from cogtrain.blocks.verdicts import forget, gpu_facts, recalled

FACTS = {"gpu": "one card", "libraries": "torch 2.13.0"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COGTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trials"


def trying(found):
    tried = []
    return tried, lambda: tried.append(found) or found


def test_what_works_is_not_tried_again():
    tried, trial = trying("works")
    assert [recalled("a kernel", FACTS, trial) for _ in range(3)] == ["works"] * 3
    assert len(tried) == 1
    assert recalled("another kernel", FACTS, trial) == "works"
    assert len(tried) == 2
    assert recalled("a kernel", FACTS, trial) == "works"
    assert len(tried) == 2


def test_what_another_process_has_found_meanwhile_is_kept():
    tried, trial = trying("works")
    recalled("a kernel", FACTS, lambda: recalled("another kernel", FACTS, trial))
    assert [recalled(what, FACTS, trial) for what in ("a kernel", "another kernel")] == ["works"] * 2
    assert len(tried) == 1


def test_what_fails_is_tried_each_time():
    tried, trial = trying("")
    assert [recalled("a kernel", FACTS, trial) for _ in range(2)] == ["", ""]
    assert len(tried) == 2


@pytest.mark.parametrize(
    "changed", [{"gpu": "another card"}, {"libraries": "torch 2.14.0"}, {"sources": "of tomorrow"}]
)
def test_a_change_of_anything_is_tried_anew(changed):
    tried, trial = trying("works")
    recalled("a kernel", FACTS, trial)
    recalled("a kernel", FACTS | changed, trial)
    assert len(tried) == 2


def test_nothing_is_kept_of_a_cpu_nor_after_a_failure(cache):
    tried, trial = trying("works")
    for _ in range(2):
        recalled("a kernel", gpu_facts(torch.device("cpu"), cache), trial)
    assert len(tried) == 2
    assert not cache.exists()
    recalled("a kernel", FACTS, trial)
    forget(FACTS)
    recalled("a kernel", FACTS, trial)
    assert len(tried) == 4


def test_a_damaged_or_foreign_file_is_no_verdict(cache):
    _, trial = trying("works")
    recalled("a kernel", FACTS, trial)
    (file,) = cache.iterdir()
    for content in (b"", b"{", b"[]", json.dumps({"a kernel": 7}).encode()):
        file.write_bytes(content)
        tried, trial = trying("works")
        assert recalled("a kernel", FACTS, trial) == "works"
        assert len(tried) == 1


def test_a_cache_that_cannot_be_written_costs_a_trial(cache):
    cache.parent.write_text("a file where the folder would be")
    tried, trial = trying("works")
    assert [recalled("a kernel", FACTS, trial) for _ in range(2)] == ["works", "works"]
    assert len(tried) == 2
