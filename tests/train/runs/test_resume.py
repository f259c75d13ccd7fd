"""Killed, stopped, moved to another number of processes: the run goes on as if nothing had been."""

import json
import random
import shutil
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
from forked import Forked, ForkedRanks
from safetensors.torch import load_file
from waiting import wait_for_steps

from cogcommon.errors import RunError, SettingError, ShardError
from cogcommon.files.atomic import temporary_beside
from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.distributed.strategy import read_weights
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.runs.claim import claimed
from cogtrain.runs.folder import read_run
from cogtrain.settings.training import LoraSettings

STEPS = 6
# In a learning rate that lets the losses depend on every step before.
OPTIONS = ["--steps", STEPS, "--rank", 4, "--lr", 1e-2, "--save-every", 1, "--keep", 2]


def finish(process, expected=0):
    code, out, err = process.end()
    assert code == expected, (code, out, err)
    return out, err


def words_for(strategy, world, run):
    # Always two samples a step.
    return ["lora", "--shards", "out/*.tar", "--strategy", strategy, "--batch-size", 2 // world, "--out", run, *OPTIONS]


def begin_ranks(strategy, world, run):
    """The processes of a run, as a launcher would begin them."""
    return ForkedRanks(world, ["cogtrain", *words_for(strategy, world, run.name)], run.parent)


def finish_ranks(ranks):
    found = ranks.end()
    assert all(code == 0 for code, _, _ in found), found
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def undisturbed(place, make_shards, losses):
    """undisturbed(strategy) -> losses of a run that nothing happened to, on two processes."""
    make_shards(place / "out", samples=8)
    Forked(["cogtrain", "--version"]).end()  # from now on the server has imported what they need
    known = {}

    def run(strategy):
        if strategy not in known:
            finish_ranks(begin_ranks(strategy, 2, place / f"{strategy}-undisturbed"))
            known[strategy] = losses(place / f"{strategy}-undisturbed")
            assert sorted(known[strategy]) == list(range(1, STEPS + 1))
        return known[strategy]

    return run


CAMPAIGN = [(s, a, b) for s in ("ddp", "zero2", "zero3") for a, b in ((2, 2), (2, 1), (1, 2))]
KILLS = [("zero3", 1, 2, 0)] + [  # the first in CI; DDP is stopped there by signals, below
    pytest.param(*CAMPAIGN[number % len(CAMPAIGN)], number, marks=pytest.mark.full) for number in range(1, 24)
]


@pytest.mark.parametrize(("strategy", "before", "after", "number"), KILLS)
def test_killed_and_resumed_equals_undisturbed(place, undisturbed, strategy, before, after, number, losses):
    expected = undisturbed(strategy)
    run = place / f"{strategy}-{before}-{after}-{number}"
    rng = random.Random(number)
    ranks = begin_ranks(strategy, before, run)
    wait_for_steps(run, rng.randint(0, STEPS), ranks)
    time.sleep(rng.random() * 0.2)  # in the middle of a step, of a checkpoint, between two, of the export
    killed = ranks.lose()
    print(f"{'killed' if killed else 'it had ended'}; {sorted(path.name for path in run.glob('*'))}")
    finish_ranks(begin_ranks(strategy, after, run))
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == {".cogtune.json", ".lock"}
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]


def test_another_number_of_processes_is_told_in_a_line_of_ours_and_in_none_of_deepspeeds(place, undisturbed):
    undisturbed("zero3")
    words = [*words_for("zero3", 1, "zero3-on-one"), "--resume", "zero3-undisturbed/checkpoint-5"]
    ((_, out, err),) = finish_ranks(ForkedRanks(1, ["cogtrain", *words], place))
    (line,) = [line for line in out.splitlines() if line.startswith("converts")]
    assert "checkpoint-5 from 2 to 1 processes" in line
    assert "%|" not in out + err and "WARNING" not in out + err


HALTING = """
import time
from pathlib import Path
from forked import _fork_ranks
from waiting import steps_made
from cogtrain.distributed import signals
from cogtrain.trainer import trainer
signals._ONE_WISH = 1000.0  # however late the launcher passes on what its processes have been sent as well
_fork_ranks()
asked_to_stop = trainer.asked_to_stop
def asked(run):
    while steps_made(run) >= 2 and not Path("told").exists():
        time.sleep(0.02)
    return asked_to_stop(run)
trainer.asked_to_stop = asked
from cogtrain.cli import main
main()
"""


# SLURM sends its signals to the launcher and to its processes at once.
@pytest.mark.parametrize(("number", "code", "world"), [(signal.SIGUSR1, 138, 2), (signal.SIGTERM, 143, 1)])
def test_a_signal_saves_and_the_last_line_resumes(place, undisturbed, number, code, world, losses):
    expected = undisturbed("ddp")
    run = place / f"stopped-{code}"
    words = [*words_for("ddp", world, run.name), "--nproc", world]
    words[words.index("--save-every") + 1] = 100  # nothing but the signal saves
    (place / "halting.py").write_text(HALTING)  # however late the signal is, it comes before the third step
    (place / "told").unlink(missing_ok=True)
    process = Forked([place / "halting.py", *words], place)
    assert wait_for_steps(run, 2, process), process.end()
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
        member.send_signal(number)
    (place / "told").touch()
    out, err = finish(process, code)
    assert "Traceback" not in err
    assert len(checkpoints.list_checkpoints(run)) == 1
    command = out.strip().splitlines()[-1].removeprefix("stopped; to resume: ").split()
    assert command[0] == "cogtrain"
    finish(Forked(command, place))
    assert losses(run) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def here(tmp_path, make_shards, train_here):
    """here(after_step, **settings) -> run folder; trains in this process."""
    make_shards(tmp_path / "out", samples=4)

    def run(after_step=None, **settings):
        common = {"shards": [str(tmp_path / "out")], "out": tmp_path / "run", "rank": 4, "lr": 1e-2}
        return train_here(LoraSettings(**common | settings), after_step=after_step)

    return run


def test_on_one_process_a_resumed_run_is_bit_equal(here, tmp_path, losses):
    whole = here(steps=6, out=tmp_path / "whole", lora_dropout=0.1, caption_dropout=0.5)
    here(steps=3, lora_dropout=0.1, caption_dropout=0.5)
    counted = []
    parts = here(counted.append, steps=6, lora_dropout=0.1, caption_dropout=0.5)
    assert losses(parts) == losses(whole) and counted == [4, 5, 6]
    one, two = (read_weights(run / "checkpoint-6") for run in (whole, parts))
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_shard_that_goes_bad_costs_no_step(here, tmp_path, losses, accumulate):
    """`cogprep encode` takes out a sample, say, while a run trains on the shards."""
    whole = here(steps=9, out=tmp_path / "whole", accumulate=accumulate)
    tar, *_ = (tmp_path / "out").glob("*.tar")
    before = tar.read_bytes()

    def spoil(step):
        if step == 2:
            tar.write_bytes(bytes(len(before)))

    with pytest.raises(ShardError, match="a damaged shard"):
        here(spoil, steps=9, accumulate=accumulate)
    run = tmp_path / "run"
    (saved,) = checkpoints.list_checkpoints(run)
    assert 2 <= checkpoints.step_of(saved) == max(losses(run)) < 9
    tar.write_bytes(before)
    assert losses(here(steps=9, accumulate=accumulate)) == losses(whole)


def test_beginning_anew_costs_no_checkpoint_before_there_is_a_new_one(here, tmp_path, losses):
    """A kill, or a lack of memory, may come first; and somebody may have thought better of it."""
    run = here(steps=4, save_every=2)
    first = losses(run)

    def killed(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(killed, steps=4, save_every=2, resume="never")
    assert not checkpoints.list_checkpoints(run)
    assert [path.name for path in checkpoints.set_aside(run)] == ["checkpoint-2", "checkpoint-4"]
    back = here(steps=5, resume=str(run / checkpoints.ASIDE / "checkpoint-4"), out=tmp_path / "back")
    assert losses(back).keys() == {5}
    again = here(steps=4, save_every=2, resume="never")
    assert losses(again) == first and not (run / checkpoints.ASIDE).exists()

    (run / "checkpoint-4/notes.txt").write_text("mine")  # as a whole it is not ours to move
    with pytest.raises(KeyboardInterrupt):
        here(killed, steps=4, save_every=2, resume=str(run / "checkpoint-2"))
    assert (run / "checkpoint-4/notes.txt").read_text() == "mine" and not checkpoints.set_aside(run)
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["checkpoint-2"]


def test_where_the_disk_has_no_room_beside_them_the_old_ones_go_at_once(here, monkeypatch):
    run = here(steps=2, save_every=1)
    monkeypatch.setattr("cogtrain.trainer.trainer.has_room_beside", lambda *_: False)
    seen = []
    here(lambda step: seen.append(checkpoints.set_aside(run)), steps=1, resume="never")
    assert seen == [[]] and [path.name for path in checkpoints.list_checkpoints(run)] == ["checkpoint-1"]


def test_a_resume_clears_what_a_kill_left_half_written(here):
    run = here(steps=2)
    temporary_beside(run / "report.html").write_text("half")
    checkpoint = temporary_beside(run / "checkpoint-9")
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_text("half")
    (run / ".mine.tmp").write_text("somebody's own")
    here(steps=3)
    left = {path.name for path in run.iterdir() if path.name.startswith(".")}
    assert left == {".cogtune.json", ".lock", ".mine.tmp"}


def test_a_second_process_in_the_same_folder_is_refused_and_harms_nothing(here, tmp_path):
    run = here(steps=2)
    before = (run / "config.toml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    with claimed(run), pytest.raises(RunError, match="another process trains in this folder"):
        here(steps=3)
    assert before == ((run / "config.toml").read_bytes(), (run / "metrics.jsonl").read_bytes())
    here(steps=3)


def test_a_moving_average_is_resumed_and_exported(here, tmp_path, losses):
    from cogtrain.model import lora

    plain = here(steps=4, out=tmp_path / "plain")
    whole = here(steps=4, out=tmp_path / "whole", ema=0.9)
    here(steps=2, ema=0.9)
    parts = here(steps=4, ema=0.9)
    assert losses(whole) == losses(plain)  # it watches, and changes nothing
    files = [load_file(run / lora.FILE) for run in (plain, whole, parts)]
    assert all((files[1][name] == files[2][name]).all() for name in files[1])
    assert any((files[0][name] != files[1][name]).any() for name in files[0])


def test_a_moving_average_may_begin_at_a_resume(here, tmp_path):
    """From the weights that the run goes on with: nothing of what it began with is in it."""
    run = here(steps=3)
    weights = read_weights(run / "checkpoint-3")
    here(steps=4, lr=0.0, ema=0.9)
    averaged = load_file(run / "checkpoint-4" / "average.safetensors")
    assert averaged.keys() == weights.keys()
    assert all((averaged[name] == weights[name]).all() for name in weights)


def test_never_starts_anew_and_a_path_is_continued(here, tmp_path, losses):
    first = here(steps=3)
    assert losses(here(steps=2, resume="never")) == {k: v for k, v in losses(first).items() if k <= 2}
    other = here(steps=4, out=tmp_path / "other", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert sorted(losses(other)) == [3, 4]


def test_a_schedule_that_ends_later_is_said(here, capsys):
    here(steps=2, lr_schedule="linear")
    capsys.readouterr()
    run = here(epochs=1, lr_schedule="linear")
    said = "note: --lr-schedule linear ends at step 4 now, not 2: the rate was 0 and goes on at 0.0025\n"
    assert said in capsys.readouterr().out
    assert read_run(run).steps[2].lr == pytest.approx(0.0025)
    here(epochs=2, lr_schedule="constant")
    assert "ends at step" not in capsys.readouterr().out


def test_checkpoints_by_the_clock(here, monkeypatch):
    """What is between two checkpoints is no more than --save-minutes, here three looks of 20 s."""
    from cogtrain.trainer import saver

    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: next(now)))
    # The clock is looked at once when the run is set up, after each step, and after each checkpoint.
    run = here(steps=8, save_minutes=1, keep=9)
    assert [path.name for path in checkpoints.list_checkpoints(run)] == [f"checkpoint-{n}" for n in (3, 6, 8)]


def test_going_back_takes_later_checkpoints_away(here):
    """They would pass for newer ones, and push the new ones out."""
    run = here(steps=6, save_every=1, keep=9)
    again = here(steps=4, save_every=1, keep=2, resume=str(run / "checkpoint-2"))
    assert [path.name for path in checkpoints.list_checkpoints(again)] == ["checkpoint-3", "checkpoint-4"]


def test_going_back_takes_videos_of_later_steps_away(here):
    """The report would show them as those of the steps that are made now."""
    run = here(steps=2, save_every=1)
    videos = [run / "validation" / f"step-00000{name}.mp4" for name in ("0/0", "1/0", "2/0", "2/mine")]
    for video in videos:
        video.parent.mkdir(parents=True, exist_ok=True)
        video.touch()
    here(steps=2, resume=str(run / "checkpoint-1"))
    assert [video.exists() for video in videos] == [True, True, False, True]
    here(steps=1, resume="never")
    assert [video.exists() for video in videos] == [True, False, False, True] and not videos[1].parent.exists()


def test_the_resume_command_of_a_run_that_began_anew_resumes(here):
    from cogcommon.cli.settings import resolve

    run = here(steps=2, resume="never")
    assert resolve(LoraSettings, {}, run / "config.toml").resume == "auto"


def test_a_finished_run_is_not_trained_further(here, losses):
    before = losses(here(steps=2))
    assert losses(here(steps=2)) == before


def test_fewer_steps_than_were_made_are_not_what_the_weights_are_labelled_with(here):
    from cogtrain.model import lora
    from cogtrain.model.lora_file import read_facts

    here(steps=3)
    run = here(steps=2)
    assert read_run(run).facts.steps == 3 and "| steps | 3 of 3 |" in (run / "README.md").read_text()
    assert read_facts(run / lora.FILE)["steps"] == "3"


def test_epochs_given_as_an_option_take_the_place_of_a_runs_steps(here):
    from cogcommon.cli.settings import resolve

    run = here(steps=2)
    again = resolve(LoraSettings, {"epochs": 1}, run / "config.toml")
    assert (again.steps, again.epochs) == (None, 1)
    with pytest.raises(SettingError, match="both say how long"):  # where both were typed
        resolve(LoraSettings, {"epochs": 1, "steps": 2}, run / "config.toml")


@pytest.mark.parametrize("change", ["other weights", "another revision"])
def test_a_run_goes_on_with_the_base_model_that_it_began_with(here, tmp_path, change):
    model = tmp_path / "model"
    shutil.copytree(open_checkpoint("tiny").root, model)
    run = here(steps=2, model=str(model))
    if change == "other weights":
        (weights,) = (model / "transformer").glob("*.safetensors")
        with weights.open("r+b") as stream:
            stream.seek(-4, 2)
            stream.write(b"\0\0\0\0")
    else:  # as a checkpoint of the hub would say it
        state = json.loads((run / "checkpoint-2" / "state.json").read_text())
        state["facts"]["revision of the base model"] = "0" * 40
        (run / "checkpoint-2" / "state.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match="another revision of the base model"):
        here(steps=3, model=str(model))


@pytest.mark.parametrize(
    ("change", "says", "fix"),
    [
        ({"batch_size": 2, "accumulate": 2}, "another global batch: 1 then, 4 now", "batch size x accumulate is 1"),
        ({"global_batch": 2}, "another global batch: 1 then, 2 now", "--global-batch 1"),
        ({"seed": 7}, "another --seed: 42 then, 7 now", "set --seed back"),
        ({"rank": 8}, "another --rank: 4 then, 8 now", "another --out"),
        ({"optimizer": "adamw8bit"}, "another --optimizer", "another --out"),
        ({"resume": "nowhere"}, "no such folder to resume", "checkpoint-N"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(here, change, says, fix):
    here(steps=2)
    with pytest.raises(RunError, match=says) as caught:
        here(steps=3, **change)
    assert fix in caught.value.fix


def test_other_shards_are_refused(here, tmp_path, make_shards):
    here(steps=2)
    make_shards(tmp_path / "more", samples=4, seed=5, captions=("other",))
    with pytest.raises(RunError, match="other shards") as caught:
        here(steps=3, shards=[str(tmp_path / "more")])
    assert "cogtrain export --run" in caught.value.fix and "--init-lora" in caught.value.fix


def test_a_global_batch_that_accumulation_can_restore_is_named(here):
    here(steps=1, batch_size=2, accumulate=2)
    with pytest.raises(RunError) as caught:
        here(steps=2, batch_size=2)
    assert caught.value.fix == "--accumulate 2"
    with pytest.raises(SettingError, match="4 cannot be divided among 1 process with --batch-size 3") as caught:
        here(steps=2, batch_size=3, accumulate=2)
    assert "--batch-size 1, 2 or 4" in caught.value.fix


def test_a_damaged_checkpoint_is_named(here):
    run = here(steps=2)
    weights = run / "checkpoint-2" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RunError, match="cannot be loaded") as caught:
        here(steps=3)
    assert "checkpoint-2" in caught.value.where
