"""What runs on a GPU of a cluster, here without one: what a node refuses, and how clips at hand are acknowledged."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from cogcommon.shards.contract import Contract
from cogprep.encode.outcome import Outcome
from cogprep.encode.part import encode_slice
from cogprep.engines.actor import EncodeActor, Fault


class Planned:
    """An engine that only keeps what it is given."""

    def device_type(self):
        return "cpu"

    def encode(self, job):
        self.job = job


@pytest.fixture
def job(encoded, settings_of):
    """Of five clips, two a shard, to a new folder."""
    engine = Planned()
    encode_slice(settings_of(encoded, out=encoded / "new", precision="fp32"), engine)
    return engine.job


def other(contract: Contract) -> Contract:
    return replace(contract, vae=replace(contract.vae, weights_sha256="0" * 64))


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        ("folder", "does not have the folder", "--data-root"),
        ("device", "would run on cpu here", None),
        ("weights", "something else than the driver planned", "vae"),
    ],
)
def test_what_a_node_refuses(job, tmp_path, change, what, where):
    settings = replace(job.settings, data_root=tmp_path / "gone") if change == "folder" else job.settings
    contract = other(job.contract) if change == "weights" else job.contract
    fault = EncodeActor(settings, contract, "cuda" if change == "device" else "cpu", 1).load()
    assert isinstance(fault, Fault) and fault.told
    assert what in fault.what and (where is None or where in fault.where)
    assert not list(job.settings.out.glob("contract.json"))


def test_clips_are_begun_when_they_have_been_seen(job, encoded):
    """Carefully, and with one set aside; then the rest of the folder, and what was set aside."""
    actor = EncodeActor(job.settings, job.contract, "cpu", 1)
    assert actor.load() is None
    shard = job.shards[0]
    first, second = (planned.key for planned in shard.samples)
    given = []
    thread = threading.Thread(target=lambda: given.append(actor.encode(shard, {second: "poison"}, careful=True)))
    thread.start()
    while not actor.status("").clip:
        pass
    assert actor.status("").clip == first  # and there it stays
    assert actor.status("").settled == 0
    assert actor.status(first).clip in (first, "")
    thread.join()
    (outcome,) = given
    assert isinstance(outcome, Outcome) and outcome.encoded == 1
    assert [(one.sample.source, one.reason) for one in outcome.postponed] == [
        (shard.samples[1].sample.source, "poison")
    ]
    assert actor.status(first).clip == "" and actor.status(first).settled == 2
    for shard in job.shards[1:]:
        assert actor.encode(shard, {}, careful=False).encoded == len(shard.samples)
    assert actor.encode(job.shards[1], {}, careful=False).elsewhere == 2  # its record is there
    names = sorted(path.name for path in (encoded / "out").glob("*.tar"))
    for name in names[1:]:
        assert (encoded / "new" / name).read_bytes() == (encoded / "out" / name).read_bytes()
