"""What runs on a GPU of a cluster, here without one: what a node refuses, and how clips at hand are acknowledged."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from waiting import wait_until

from cogcommon.cli import stages
from cogcommon.model.text_encoder import TextEncoder
from cogcommon.shards.contract import Contract
from cogprep.encode.models import Models
from cogprep.encode.outcome import Outcome
from cogprep.encode.part import encode_slice
from cogprep.engines import actor as actor_module
from cogprep.engines.actor import EncodeActor, Fault
from cogprep.processes.pool import Pool


class Planned:
    """An engine that only keeps what it is given."""

    def device_type(self):
        return "cpu"

    def encode(self, job):
        self.job = job


@pytest.fixture(autouse=True)
def _ends(monkeypatch):
    """An actor and its decode processes live as long as their process, which is the tests' here."""
    made = []

    class EndingPool(Pool):
        def __enter__(self):
            made.append(self)
            return super().__enter__()

    monkeypatch.setattr(actor_module, "Pool", EndingPool)
    monkeypatch.setattr(stages, "_checks", [])
    yield
    for pool in made:
        pool.__exit__()


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


def test_t5_stays_where_it_is_while_there_is_room(job, encoded, monkeypatch):
    moves = []
    for name in ("make_room", "come_back"):
        moved = getattr(TextEncoder, name)
        monkeypatch.setattr(TextEncoder, name, lambda text, name=name, moved=moved: (moves.append(name), moved(text)))
    actor = EncodeActor(job.settings, job.contract, "cpu", 1)
    assert actor.load() is None and actor.encode(job.shards[0], {}, careful=False).encoded == 2
    assert "make_room" not in moves
    monkeypatch.setattr(Models, "_has_room", lambda models: False)
    assert actor.encode(job.shards[1], {}, careful=False).encoded == 2 and moves[-1] == "make_room"
    assert actor.encode(job.shards[2], {}, careful=False).encoded == 1 and moves[-2:] == ["come_back", "make_room"]
    for tar in (encoded / "out").glob("*.tar"):
        assert (encoded / "new" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.gpu
def test_on_a_gpu_the_bytes_are_the_same_wherever_t5_waits(job, tmp_path, monkeypatch):
    found = []
    for stays in (True, False):
        out = tmp_path / f"{stays}"
        out.mkdir()
        monkeypatch.setattr(Models, "_has_room", lambda models, stays=stays: stays)
        actor = EncodeActor(replace(job.settings, out=out), job.contract, "cuda", 1)
        assert actor.load() is None
        assert sum(actor.encode(shard, {}, careful=False).encoded for shard in job.shards) == 5
        found.append({tar.name: tar.read_bytes() for tar in out.rglob("*.tar")})
    assert found[0] == found[1] and len(found[0]) == 3


def test_clips_are_begun_when_they_have_been_seen(job, encoded):
    """Carefully, and with one set aside; then the rest of the folder, and what was set aside."""
    actor = EncodeActor(job.settings, job.contract, "cpu", 1)
    assert actor.load() is None
    shard = job.shards[0]
    first, second = (planned.key for planned in shard.samples)
    given = []
    thread = threading.Thread(target=lambda: given.append(actor.encode(shard, {second: "poison"}, careful=True)))
    thread.start()
    wait_until(lambda: actor.status("").clip or not thread.is_alive())
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
