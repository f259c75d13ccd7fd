"""``--follow``: each epoch is over the shards that are committed at its start; killed and resumed, the same steps."""

import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import Forked, ForkedRanks
from waiting import steps_made, wait_for_steps

from cogcommon.errors import CogError, RunError, SettingError, StoreError
from cogcommon.media.video import write_mp4
from cogcommon.model.families import Resolution
from cogtrain.data import growing
from cogtrain.distributed.peers import Node, Peers
from cogtrain.report.page import write_report
from cogtrain.runs import follow
from cogtrain.runs.folder import EPOCHS_FILE, read_run
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings

OPTIONS = {"rank": 4, "lr": 1e-2, "follow": True}


class Killed(BaseException):
    """The end of a process that nobody asks."""


class Told(Peers):
    """Keeps the faults that the processes of a run tell each other of."""

    told = ()

    def together(self, act):
        try:
            return act()
        except CogError as fault:
            self.told = [*self.told, fault]
            raise


@pytest.fixture
def followed(tmp_path, shards_to_come, train_here):
    """followed(name, commits, ...) -> run folder. One of five shards is there; another comes after each of these steps.

    With ``killed_after`` it ends there, and is begun again, once more shards have come.
    """

    def run(name, commits, killed_after=None, first=1, shards=None, **settings):
        out = tmp_path / name / "out"
        coming = shards_to_come(out, **{"samples": 10} | (shards or {}))
        for _ in range(first):
            next(coming)
        left = list(commits)

        def after_step(step, dies):
            while left and left[0] == step:
                left.pop(0)
                next(coming)
            if step == dies:
                raise Killed

        common = OPTIONS | {"shards": [str(out)], "out": tmp_path / name / "run"} | settings
        if killed_after is not None:
            with pytest.raises(Killed):
                train_here(LoraSettings(**common), after_step=lambda step: after_step(step, killed_after))
        return train_here(LoraSettings(**common), after_step=lambda step: after_step(step, None))

    return run


def epochs_of(run):
    """Of each step."""
    return [line.epoch for line in read_run(run).steps]


def test_killed_in_any_epoch_and_resumed_it_makes_the_same_steps(followed, losses, capsys, monkeypatch):
    commits, options = [1, 4, 5, 8], {"steps": 16, "save_every": 5}
    made, make = [], follow.make_sampler
    monkeypatch.setattr(follow, "make_sampler", lambda *arguments: made.append(arguments) or make(*arguments))
    whole = followed("whole", commits, **options)
    assert len(made) == 4  # one for each epoch: of a million samples each takes seconds
    said = capsys.readouterr().out
    assert "epoch 0 (from step 1): 2 samples in 1 shard; 2 steps" in said
    assert "epoch 2 (from step 7): 8 samples in 4 shards, 4 new since epoch 1; 8 steps" in said
    assert "epoch 3 (from step 15): 10 samples in 5 shards, 2 new since epoch 2; 10 steps" in said
    assert epochs_of(whole) == [0] * 2 + [1] * 4 + [2] * 8 + [3] * 2
    for step in (3, 8):  # before any checkpoint; in the epoch after the last one
        # The step after which it dies commits as in the whole run, so a resume finds more than its epochs had.
        assert losses(followed(f"killed-{step}", commits, step, **options)) == losses(whole), step
    facts = read_run(whole).facts
    assert (facts.samples_at_start, sum(facts.samples.values()), facts.shards) == (2, 10, 5)
    write_report(whole)
    assert "2 at the start, now 10 samples in 5 shards" in (whole / "report.html").read_text()


def test_sizes_captions_and_repeats_that_come_later(followed, losses):
    """Pictures come after clips; two captions a clip."""
    shards = {"resolutions": (Resolution(9, 64, 96), Resolution(1, 64, 96)), "samples": 4, "captions_each": 2}
    options = {"steps": 16, "save_every": 6, "captions": "one", "repeat": ["1x64x96=3"], "shards": shards}
    shards["form"] = "tiny-1.5"
    whole = followed("whole", [2, 3, 5], **options)
    assert epochs_of(whole) == [0] * 1 + [1] * 1 + [2] * 2 + [3] * 5 + [4] * 7
    assert losses(followed("killed", [2, 3, 5], 11, **options)) == losses(whole)


def test_it_waits_until_there_is_a_whole_step(tmp_path, shards_to_come, train_here, monkeypatch, capsys):
    out, coming, waited = tmp_path / "out", shards_to_come(tmp_path / "out", samples=8), []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) > 1:
            next(coming)

    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(follow, "_SAY_EVERY", 0.0)
    settings = {"shards": [str(out)], "validate_shards": [f"{out}/000000.tar"], "batch_size": 4, "steps": 2}
    run = train_here(LoraSettings(**OPTIONS | settings, out=tmp_path / "run"))
    said = capsys.readouterr().err
    lacking = f"none so far; the folder {out} does not exist (yet); looks"
    assert f"waits for shards in {out}/000000.tar: {lacking}" in said and f"waits for shards in {out}: none" in said
    assert "2 samples of the 4 of a step so far" in said and len(waited) == 4
    # What was held out at the start is, whatever comes: the losses before and after would not compare.
    next(coming)
    train_here(LoraSettings(**OPTIONS | settings | {"validate_shards": [str(out)], "steps": 3}, out=run))
    assert read_run(run).facts.held_out == 2 and len(read_run(run).validations) == 2


@pytest.mark.full
def test_two_processes_train_what_one_does(tmp_path, shards_to_come, train_here, losses):
    coming = shards_to_come(tmp_path / "out", samples=12, per_shard=4)
    next(coming)
    words = ["cogtrain", "lora", "--shards", "out", "--rank", 4, "--lr", 1e-2, "--follow", "--save-every", 3]
    words += ["--steps", 8, "--out", "run"]
    ranks = ForkedRanks(2, words, tmp_path)
    run = tmp_path / "run"
    for steps in (1, 4):
        wait_for_steps(run, steps, ranks)
        next(coming)
    ranks.lose()
    before = losses(run)
    ended = ForkedRanks(2, words, tmp_path).end()
    assert all(code == 0 for code, *_ in ended), ended
    found = losses(run)
    assert sorted(found) == list(range(1, 9))
    assert {step: found[step] for step in before} == pytest.approx(before, rel=1e-5)
    # One process, which the record tells what each epoch was over, trains the same from the start.
    epochs = json.loads((run / EPOCHS_FILE).read_text())["epochs"]
    assert [epoch["samples"] for epoch in epochs][:2] == [4, 8] and epochs[1]["after"] == 2
    one = shutil.copytree(run, tmp_path / "one", ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = {"shards": [str(tmp_path / "out")], "batch_size": 2, "steps": 8, "out": one}
    assert losses(train_here(LoraSettings(**OPTIONS | settings))) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--deepspeed", {"deepspeed": Path("mine.json"), "strategy": "ddp"}),
        ("--ema", {"ema": 0.9, "strategy": "zero2"}),
        ("--lr", {"lr": 3.0}),
        ("--keep-best", {"keep_best": True}),
        ("--precision fp16", {"precision": "fp16"}),
        ("--out", {"out": Path("somebodys")}),
        ("gone.safetensors", {"init_lora": Path("gone.safetensors")}),
        ("--validate-prompts gone.txt", {"validate_prompts": Path("gone.txt")}),
        ("--validate-image", {"model": "tiny", "validate_prompt": ["a ball"], "validate_image": ["a.png"]}),
        ("no-such-model", {"model": "no-such-model"}),
        ("--target-modules", {"model": "tiny", "target_modules": ["to_x"]}),
        ("mine.json: fp16.enabled", {"model": "tiny", "deepspeed": Path("mine.json"), "strategy": "zero2"}),
    ],
)
def test_what_needs_no_shards_is_refused_before_it_waits_for_them(tmp_path, monkeypatch, option, changes):
    """By all processes together, for only one of them may lack a file, and the others would wait for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"fp16": {"enabled": true}}')
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "photo.jpg").write_bytes(b"")

    def waits(seconds):
        pytest.fail("it waits for shards")

    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=waits, monotonic=time.monotonic))
    settings = LoraSettings(**OPTIONS | {"shards": [str(tmp_path / "to-come")]} | {"steps": 2} | changes)
    peers = Told(0, 1, (Node.here(),))
    with pytest.raises(CogError) as caught:
        open_run(settings, torch.device("cpu"), 1, peers)
    assert option in str(caught.value) and peers.told == [caught.value]


def test_what_cannot_be_followed_or_gone_on_with_is_refused(tmp_path, followed, train_here):
    with pytest.raises(SettingError, match="how long an epoch will be") as caught:
        LoraSettings(follow=True, epochs=3)
    assert "--steps" in caught.value.fix
    run = followed("run", [1], steps=4)  # into the middle of the second epoch
    out = tmp_path / "run" / "out"

    def refused(**changes):
        with pytest.raises((RunError, SettingError)) as caught:
            train_here(LoraSettings(**OPTIONS | {"shards": [str(out)], "out": run, "steps": 9} | changes))
        return str(caught.value)

    told = refused(shards=[str(out / "000000.tar")], resume="never")
    assert "nothing to follow" in told and f"--shards {out}/ " in told
    assert "another --follow: True then, False now" in refused(follow=False)
    assert "epoch 1, which goes on, began with other repeat" in refused(repeat=[f"{out}/000001.tar=2"])
    (out / "000001.parquet").rename(out / "kept")
    told = refused()
    assert f"gone, or others now: {out}/000001.tar" in told and "put them back" in told
    (out / "kept").rename(out / "000001.parquet")
    (run / EPOCHS_FILE).rename(run / "elsewhere")
    assert "does not say which samples the steps before step 5" in refused()
    (run / EPOCHS_FILE).write_text("{")
    assert "record of the run's epochs is damaged" in refused()


def test_shards_that_go_or_cannot_be_looked_for(followed, tmp_path, monkeypatch, capsys):
    look, asked = growing.expand, []

    def broken(words, option, **named):
        asked.append(option)
        if len(asked) == 2:
            raise StoreError("cannot be read: the store is away", where="there")
        if len(asked) == 4:
            for name in ("000000.tar", "000000.parquet"):
                (tmp_path / "run" / "out" / name).unlink()
        return look(words, option, **named)

    monkeypatch.setattr(growing, "expand", broken)
    run = followed("run", [1], steps=12)
    said = capsys.readouterr().out
    assert "cannot look for new shards: cannot be read: the store is away (there); trains the last ones again" in said
    assert "epoch 2 (from step 5): 4 samples in 2 shards, 2 new since epoch 1" in said
    assert "epoch 3 (from step 9): 2 samples in 1 shard, 4 in epoch 2, of which 1 shard is gone; 2 steps" in said
    assert epochs_of(run) == [0] * 2 + [1] * 2 + [2] * 4 + [3] * 2 + [4] * 2


@pytest.mark.full
@pytest.mark.parametrize("number", range(4))
def test_a_real_encode_and_a_real_run_both_killed(tmp_path, train_here, losses, number):
    """On two processes, while clips are encoded; then one process trains the same from what the record says."""
    (tmp_path / "ds").mkdir()
    for clip in range(20):
        frames = np.random.default_rng(clip).integers(0, 255, (12, 1, 1, 3)).astype(np.uint8)
        write_mp4(tmp_path / "ds" / f"{clip}.mp4", np.broadcast_to(frames, (12, 64, 96, 3)).copy(), 8)
    (tmp_path / "ds" / "prompts.txt").write_text("".join(f"clip {clip}\n" for clip in range(20)))
    (tmp_path / "ds" / "videos.txt").write_text("".join(f"{clip}.mp4\n" for clip in range(20)))
    encode = ["cogprep", "encode", "--data-root", "ds", "--model", "tiny", "--resolution", "9x64x96"]
    encode += ["--shard-samples", 3, "--holdout", 2]
    train = [
        "cogtrain",
        "lora",
        "--shards",
        "out/",
        "--validate-shards",
        "out/val/",
        "--validate-every",
        10,
        "--rank",
        4,
    ]
    train += ["--lr", 1e-2, "--follow", "--steps", 40, "--save-every", 4, "--out", "run"]
    rng, run = random.Random(number), tmp_path / "run"
    ranks, encoder, seen = ForkedRanks(2, train, tmp_path), Forked(encode, tmp_path), {}
    until = time.monotonic() + 240
    for kills in (2, 9, 20):  # steps
        while ranks.running and time.monotonic() < until and steps_made(run) < kills:
            if encoder.running and list((tmp_path / "out").glob("*.parquet")) and rng.random() < 0.05:
                encoder.lose()
                encoder = Forked(encode, tmp_path)
            time.sleep(0.05)
        time.sleep(rng.random())
        ranks.lose()
        seen = losses(run) | seen
        ranks = ForkedRanks(2, train, tmp_path)
    ended = ranks.end()
    assert all(code == 0 for code, *_ in ended), ended
    assert encoder.end()[0] == 0
    found = losses(run)
    assert sorted(found) == list(range(1, 41))
    assert {step: found[step] for step in seen} == pytest.approx(seen, rel=1e-5)
    epochs = json.loads((run / EPOCHS_FILE).read_text())["epochs"]
    print([(epoch["after"], epoch["samples"]) for epoch in epochs])
    assert epochs[-1]["samples"] > epochs[0]["samples"]
    one = shutil.copytree(run, tmp_path / "one", ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = {"shards": [str(tmp_path / "out")], "validate_shards": [str(tmp_path / "out" / "val")], "batch_size": 2}
    again = train_here(LoraSettings(**OPTIONS | settings, validate_every=10, steps=40, out=one))
    assert losses(again) == pytest.approx(found, rel=1e-5)
