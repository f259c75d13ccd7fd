"""A video belongs to the weights it was drawn with: a card shows its own weights' alone, the report says each step."""

import dataclasses
import json
import re

import pytest

from cogcommon.files.ownership import take_output
from cogcommon.model.families import Resolution
from cogtrain.commands.generate import request_text
from cogtrain.distributed.snapshot import STATE_FILE
from cogtrain.model import lora
from cogtrain.report.card import SAMPLES, write_card
from cogtrain.report.drawn import drawn_with
from cogtrain.report.page import write_report
from cogtrain.runs.folder import FACTS_FILE, read_run
from cogtrain.settings.results import GenerateSettings
from cogtrain.validation.pipeline import Request
from cogtrain.validation.tuned import find_tuned


@pytest.fixture
def run(recorded_run):
    """Its export is of step 40, and checkpoint-40 of the same; checkpoint-20 is there, too."""
    (recorded_run / lora.FILE).write_bytes(b"after step 40")
    for step in (20, 40):
        state = {"step": step, "world": 1, "facts": {}, "settings": {}, "schema": 1, "identity": f"that of {step}"}
        (recorded_run / f"checkpoint-{step}").mkdir()
        (recorded_run / f"checkpoint-{step}" / STATE_FILE).write_text(json.dumps(state))
    return recorded_run


def drawn(run, name, weights=None, **changes):
    """Record a video as `generate` does, without drawing it."""
    settings = GenerateSettings(run=run, base=False)
    strength = changes.pop("strength", 1.0)
    tuned = find_tuned(weights or run, [], None, changes.pop("model", None), strength)
    request = Request(name, None, Resolution(17, 64, 96), 50, 6.0, 42, 226, True)
    asked = request_text(settings, tuned, dataclasses.replace(request, **changes), 8.0, "bf16")
    made = take_output(run / "generated" / name, "generated videos", "--out", asked)
    made.commit_bytes("tuned.mp4", name.encode())
    return made


def shown(run, step):
    return {one.prompt: one.otherwise for one in drawn_with(read_run(run), step)}


def test_a_card_shows_the_videos_of_its_weights_alone_and_says_how_they_were_drawn(tmp_path, run):
    drawn(run, "a-quick", steps=2, guidance=7.5, negative_prompt="blur")
    drawn(run, "b")
    drawn(run, "half", strength=0.5)
    drawn(run, "of 40", run / "checkpoint-40")
    drawn(run, "of 20", run / "checkpoint-20")
    quick = {"a-quick": "2 sampling steps, guidance 7.5, the negative prompt: blur"}
    assert shown(run, 40) == {"b": "", "of 40": "", **quick}
    assert list(shown(run, 40))[-1] == "a-quick"
    assert shown(run, 20) == {"of 20": "", "a <cat>": ""}  # which validation drew then
    assert shown(run, 30) == {}  # the newest before is not of these weights

    out = tmp_path / "out"
    take_output(out, "an export", "--out")
    card = write_card(out, read_run(run), "lora", 40).read_text()
    assert card.count("<video") == 3 and "Drawn with 2 sampling steps, guidance 7.5" in card
    (run / lora.FILE).write_bytes(b"after step 60")
    (run / FACTS_FILE).write_text(json.dumps(json.loads((run / FACTS_FILE).read_text()) | {"steps": 60}))
    assert shown(run, 60) == {} and shown(run, 40) == {"of 40": ""}
    card = write_card(out, read_run(run), "lora", 60).read_text()
    assert "<video" not in card and "widget" not in card and not list((out / SAMPLES).iterdir())


def test_the_report_says_the_step_of_each_video_also_when_its_weights_are_gone(run):
    drawn(run, "new")
    drawn(run, "of 20", run / "checkpoint-20")
    for name, weights in (("old", run), ("older", run / "checkpoint-20"), ("lost", run)):
        made = drawn(run, name, weights)
        asked = json.loads(made.request)
        del asked["step"]  # as it was recorded before
        made.request = json.dumps(asked | ({"weights": ["of others"]} if name == "lost" else {}))
        made.write()

    def labels():
        found = re.findall(r'src="generated/([^/"]+)/tuned.mp4".*?<figcaption>(.*?)<', write_report(run).read_text())
        return {name.replace("%20", " "): label.removeprefix("tuned, ") for name, label in found}

    known = {"new": "step 40", "of 20": "step 20", "older": "step 20", "lost": "step not known"}
    assert labels() == {**known, "old": "step 40"}
    (run / lora.FILE).write_bytes(b"after step 60")
    assert labels() == {**known, "old": "step not known"}
