"""How fast one thread reads samples, beside webdataset in the same run. Run with -s to see the figures."""

import time

import pytest
import safetensors.torch
import torch
import webdataset

from cogcommon.model.families import Resolution
from cogtrain.data.batches import read_sample
from cogtrain.data.shards import open_shards

SAMPLES = 48


@pytest.mark.full
def test_a_thread_reads_at_least_as_fast_as_webdataset(tmp_path, make_shards, monkeypatch):
    """True shape, 49x480x720 in bf16 (6.3 MB); ours checks each hash, webdataset checks nothing."""
    for name in ("randn", "rand"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, real=real, **options: real(*shape, **options).bfloat16())
    small = make_shards.__globals__["open_checkpoint"]

    def wide(form):
        checkpoint = small(form)
        checkpoint.text_config["d_model"] = 4096  # T5-XXL
        return checkpoint

    monkeypatch.setitem(make_shards.__globals__, "open_checkpoint", wide)
    sizes = (Resolution(49, 480, 720),)
    tars = [str(tar) for tar in make_shards(tmp_path, resolutions=sizes, samples=SAMPLES, per_shard=16)]
    shards = open_shards(tars)

    def ours():
        return [read_sample(shards, index).text.shape for index in range(SAMPLES)]

    def theirs():
        found = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        return [safetensors.torch.load(one["safetensors"])["text"].shape for one in found]

    assert ours() == theirs() and ours()[0] == (226, 4096)
    seconds = {ours: [], theirs: []}
    for _ in range(7):  # in turn, so that both meet the same machine
        for read in (ours, theirs):
            began = time.perf_counter()
            read()
            seconds[read].append(time.perf_counter() - began)
    rates = {read.__name__: SAMPLES / min(times) for read, times in seconds.items()}
    print({name: f"{rate:.0f} samples/s" for name, rate in rates.items()})
    assert rates["ours"] >= rates["theirs"]
