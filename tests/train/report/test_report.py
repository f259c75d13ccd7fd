"""The report shows what the run measured, and stands alone."""

import dataclasses
import json
import re
import shutil

import pytest

from cogcommon.errors import RunError
from cogcommon.files.ownership import record_of
from cogtrain.report.chart import Line, chart, number, smoothed
from cogtrain.report.page import write_report
from cogtrain.report.renew import renew_report
from cogtrain.runs.folder import A_RUN, RunFacts, read_metrics, read_run

FACTS = RunFacts(
    model="tiny", revision=None, family="5b", task="t2v", method="lora", contract_fingerprint="c" * 64,
    shards_fingerprint="f" * 64, shards=2, samples={"17x64x96": 30}, held_out=4, steps=40, processes=2,
    global_batch=4, strategy="zero2", precision="bf16", device="CPU", trainable=1234567, version="0.1.0",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, step_line):
    FACTS.write(tmp_path)
    (tmp_path / "config.toml").write_text('model = "tiny"\nlr = 1e-4\nout = "<b>&"\nshards = ["a.tar", "b.tar"]\n')
    lines = [step_line(step) for step in range(1, 41)]
    lines[20] = step_line(21, loss=None, grad_norm=None)  # not finite
    lines.insert(20, json.dumps({"step": 20, "val_loss": 0.15, "base_val_loss": 0.2}) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_page_shows_the_figures_and_needs_nothing_else(run):
    (run / "validation/step-000020").mkdir(parents=True)
    (run / "validation/step-000020/0.mp4").touch()
    (run / "validation/captions.json").write_text(json.dumps(["a <cat>", "never drawn"]))
    page = write_report(run).read_text()
    for shown in ("LoRA of tiny", "-25.0 %", "0.15", "3.2 GiB", "17x64x96 (30)", "1,234,567", "f" * 64, "zero2",
                  "a &lt;cat&gt;", "step 20", "&lt;b&gt;&amp;", "finished"):  # fmt: skip
        assert shown in page, shown
    assert "never drawn" not in page
    assert 'src="validation/step-000020/0.mp4"' in page
    assert not re.search(r"https?:(?!//www.w3.org/2000/svg)|<script src|src=\"/|@import", page)
    assert page.count("<svg") == 4


def test_a_run_that_has_just_begun_has_a_page_too(run):
    (run / "metrics.jsonl").unlink()
    assert "0 of 40 steps" in write_report(run).read_text()


def test_a_repeated_step_counts_once_and_a_cut_line_not_at_all(tmp_path, step_line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(step_line(1) + step_line(2, loss=5.0) + step_line(2, loss=7.0) + step_line(3)[:40])
    steps, validations = read_metrics(path)
    assert [(line.step, line.loss) for line in steps] == [(1, 1.0), (2, 7.0)]
    assert validations == []


def test_a_page_is_written_anew_where_it_is_ours_and_videos_went_into_the_run(run):
    told = []
    renew_report(run, [run.parent / "elsewhere"], told.append)
    renew_report(None, [run], told.append)
    assert not told
    video = run / "generated/a-ball/tuned.mp4"
    video.parent.mkdir(parents=True)
    for name in ("tuned", "base", "a-mine", "side-by-side"):
        video.with_name(f"{name}.mp4").touch()
    renew_report(run, [video.parent], told.append)
    assert "did not make" in told.pop() and not (run / "report.html").exists()  # these files name no maker
    record_of(run, A_RUN).write()
    renew_report(run, [video.parent], told.append)
    assert told.pop().endswith(str(run / "report.html"))
    shown = re.findall(r'src="generated/a-ball/([^"]+).mp4".*?<figcaption>(.*?)<', (run / "report.html").read_text())
    assert [name for name, _ in shown] == ["base", "tuned", "side-by-side", "a-mine"]
    assert [label for _, label in shown] == ["base model", "tuned, step not known", "side by side", "a-mine"]
    (run / "report.html").write_text("mine")
    renew_report(run, [video.parent], told.append)
    assert "not as we made it" in told.pop() and (run / "report.html").read_text() == "mine"


def test_what_is_no_run_is_refused_in_words(tmp_path, run):
    with pytest.raises(RunError, match="not a run folder"):
        read_run(tmp_path.parent)
    mine, shards = tmp_path / "all/mine", tmp_path / "all/mines"
    for folder in (mine, shards, tmp_path / "all/mine2"):
        folder.mkdir(parents=True)
    for name in ("config.toml", "facts.json"):
        shutil.copy(run / name, mine)
    for other, what in ((mine.with_name("mind"), "no such run"), (shards, "not a run folder")):
        with pytest.raises(RunError, match=what) as caught:
            read_run(other)
        assert f"did you mean {mine}?" in caught.value.fix
    (run / "facts.json").write_text(json.dumps(dataclasses.asdict(FACTS) | {"unknown": 1}))
    with pytest.raises(RunError, match="facts of the run"):
        read_run(run)


def test_smoothing_follows_a_step_and_keeps_a_constant():
    assert {round(y, 12) for _, y in smoothed([(i, 3.0) for i in range(100)])} == {3.0}
    noisy = smoothed([(i, (i % 2) + (10 if i >= 500 else 0)) for i in range(1000)])
    assert abs(noisy[400][1] - 0.5) < 0.1
    assert abs(noisy[-1][1] - 10.5) < 0.1


def test_lines_are_drawn_where_their_values_are():
    drawn = chart([Line("a", [(0, 0.0), (10, 1.0)], "plain")], width=400, height=200)
    (start, end) = re.search(r'polyline class="plain" points="(\S+) (\S+)"', drawn).groups()
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in (start, end))
    assert x0 < x1 and y0 > y1
    halfway = re.search(r'y="([\d.]+)" text-anchor="end">0.5<', drawn)[1]
    assert abs((y0 + y1) / 2 - (float(halfway) - 4)) < 1
    many = chart([Line("a", [(i, 100.0 if i == 700 else 1 + i % 2) for i in range(2000)], "raw", trimmed=True)])
    assert "<polygon" in many and ">100<" not in many, "one spike does not flatten the rest"


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1e-5, "1e-05"), (0.12345, "0.123"), (12.34, "12.3"), (1234.5, "1,234"), (4.751e30, "4.75e+30")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
