"""Two real processes that differ are refused in seconds, once, with what to do; two that agree train as ever."""

import shutil

import pytest

COMMON = {"shards": ["out"], "rank": 2, "lr": 1e-2, "save_every": 1}


def case(name, out, steps, other=None, refused=False, **settings):
    return {
        "name": name, "method": "lora", "other": other or {}, "refused": refused,
        "settings": COMMON | {"out": out, "steps": steps} | settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory, make_shards, run_ranks):
    """What one pair of processes, one after the other, saw of all cases; and the folder that both share."""
    root = tmp_path_factory.mktemp("hosts")
    # Each has its own working folder, as on a host of its own; both have the same shards.
    here, there, link = root / "here", root / "there", root / "link"
    make_shards(here / "out", samples=8)
    shutil.copytree(here / "out", there / "out")
    link.symlink_to(here)  # another path to what is shared
    (there / "fewer").mkdir()
    for file in [*sorted((here / "out").glob("*.parquet"))[1:], *sorted((here / "out").glob("*.tar"))[1:]]:
        shutil.copy(file, there / "fewer")
    shutil.copy(here / "out" / "contract.json", there / "fewer")
    apart, shared = {"folder": str(there)}, {"folder": str(link)}
    cases = [
        case("first half", "run", 2, shared),
        case("not shared", "new", 2, apart, refused=True),
        case("not shared, resumed", "run", 4, apart, refused=True),
        case("other settings", "new", 2, shared | {"settings": {"lr": 1e-3, "seed": 1}}, refused=True),
        case("fewer shards", "new", 2, shared | {"settings": {"shards": [str(there / "fewer")]}}, refused=True),
        case("no shards", "new", 2, shared | {"settings": {"shards": ["nowhere"]}}, refused=True),
        case("second half", "run", 4, shared),
        case("whole", "whole", 4, shared),
    ]
    return run_ranks(2, cases, here), here


def refusal(seen, name):
    """The error that rank 0 says; the other says none."""
    (kind, text, seconds), (other, _, _) = (rank["error"] for rank in seen[0][name])
    assert kind != "PeerFailed" and other == "PeerFailed"
    assert seconds < 60, "most of it should be waited for a folder that is seen late"
    return text


def test_a_run_folder_that_is_not_shared_is_refused(seen):
    text = refusal(seen, "not shared")
    assert "the run folder is not shared" in text and "(process 1 of 2, on " in text
    assert "do:    give --out in a folder that all hosts share" in text
    assert {path.name for path in (seen[1] / "new").iterdir()} <= {".lock", ".cogtune.json"}, "it was begun"


def test_a_checkpoint_that_one_process_does_not_see_is_refused(seen):
    text = refusal(seen, "not shared, resumed")
    assert "process 0 goes on from run/checkpoint-2, and this process sees no checkpoint there" in text


def test_processes_that_would_train_something_else_are_refused(seen):
    text = refusal(seen, "other settings")
    assert "--seed 42 there, 1 here; --lr 0.01 there, 0.001 here" in text and "the same command" in text
    assert "--shards " in refusal(seen, "fewer shards")


def test_what_one_process_lacks_is_said_once(seen):
    text = refusal(seen, "no shards")
    assert "nowhere" in text and "process 1 of 2" in text


def test_with_a_shared_folder_the_losses_are_the_undisturbed_ones(seen, losses):
    _, folder = seen
    whole = losses(folder / "whole")
    assert losses(folder / "run") == whole and sorted(whole) == [1, 2, 3, 4]
    assert not [*(folder / "run").glob(".*.tmp")]
