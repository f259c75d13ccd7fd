"""``cogtrain watch``: it serves a run's page and videos to this machine's browsers, and to no one else."""

import http.client
import json

import pytest

from cogcommon.errors import RunError, SettingError
from cogcommon.files.locks import open_locked
from cogtrain.commands import watch
from cogtrain.runs.folder import COMPARED, LOCK_FILE, asked_to_stop
from cogtrain.settings.results import WatchSettings


def ask(port, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_page_and_its_videos_are_served_whole_and_in_parts(recorded_run, served):
    video = (recorded_run / "validation/step-000020/0.mp4").read_bytes()
    with served(recorded_run) as port:
        assert ask(port, "/")[2]["Location"] == "/0/"
        status, page, _ = ask(port, "/0/")
        assert status == 200 and b"data-live=" in page and b"save and stop" in page
        there = "/0/validation/step-000020/0.mp4"
        assert ask(port, there)[:2] == (200, video)
        for asked, first, last in (("2-5", 2, 5), ("7-", 7, len(video) - 1), ("-3", len(video) - 3, len(video) - 1)):
            status, body, headers = ask(port, there, Range=f"bytes={asked}")
            assert (status, body) == (206, video[first : last + 1]), asked
            assert headers["Content-Range"] == f"bytes {first}-{last}/{len(video)}"
        assert [ask(port, there, Range=f"bytes={text}")[0] for text in ("999999999-", "x", "5-2", "-0", "-")] == [
            416
        ] * 5


def test_the_grid_of_a_comparison_is_served(recorded_run, served):
    grid = recorded_run / COMPARED / "a-ball-7" / "grid.mp4"
    grid.parent.mkdir(parents=True)
    grid.write_bytes((recorded_run / "validation/step-000020/0.mp4").read_bytes())
    with served(recorded_run) as port:
        there = grid.relative_to(recorded_run).as_posix()
        assert f'src="{there}"' in ask(port, "/0/")[1].decode()
        assert ask(port, f"/0/{there}")[:2] == (200, grid.read_bytes())


def test_nothing_else_of_the_machine_is_served(recorded_run, tmp_path, served):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (recorded_run / "validation/link.mp4").symlink_to(tmp_path / "secret.mp4")
    (recorded_run / "validation/out").symlink_to(tmp_path)
    with served(recorded_run) as port:
        for path in ("/0/config.toml", "/0/metrics.jsonl", "/0/validation/captions.json", "/0/validation/link.mp4",
                     "/0/validation/out/secret.mp4", "/0/validation/../../secret.mp4",
                     "/0/validation/%2e%2e/%2e%2e/secret.mp4",
                     "/0//etc/passwd", "/1/", "/x", "/0"):  # fmt: skip
            assert ask(port, path)[0] == 404, path
        assert ask(port, "/0/", Host="evil.example")[0] == 403  # a name that leads here, from another site's page


def test_only_our_own_page_stops_a_run_and_only_one_that_lives(recorded_run, served):
    with served(recorded_run) as port:
        token = ask(port, "/0/")[1].decode().split('data-token="')[1].split('"')[0]
        assert [ask(port, "/0/stop", "POST", X_Token=word)[0] for word in ("", "x", "\u00e9")] == [403] * 3
        status, said, _ = ask(port, "/0/stop", "POST", X_Token=token)
        assert status == 409 and b"no process trains in this folder" in said and not asked_to_stop(recorded_run)
        with open_locked(recorded_run / LOCK_FILE):
            assert ask(port, "/0/stop", "POST", X_Token=token)[0] == 200 and asked_to_stop(recorded_run)
        assert b"asked to save and stop" in ask(port, "/0/")[1]


def test_several_runs_lie_over_one_another(recorded_run, make_recorded_run, served):
    other = make_recorded_run("other", lr=3e-4)
    with served(recorded_run, other) as port:
        page = ask(port, "/")[1].decode()
        assert "2 runs" in page and 'href="/1/"' in page and "lr=0.0003" in page and "lr=0.0001" in page
        lines = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
        assert [line["name"] for line in lines] == [recorded_run.name, "other"]
        assert b"LoRA of tiny" in ask(port, "/1/")[1]


def test_a_run_that_goes_away_is_said_and_comes_back(recorded_run, served):
    with served(recorded_run) as port:
        facts = (recorded_run / "facts.json").read_bytes()
        (recorded_run / "facts.json").unlink()
        assert ask(port, "/0/")[0] == 503
        (recorded_run / "facts.json").write_bytes(facts)
        assert ask(port, "/0/")[0] == 200


def test_what_cannot_be_watched_is_refused(recorded_run, tmp_path, served):
    with served(recorded_run) as port, pytest.raises(SettingError, match="cannot be had"):
        watch.run(WatchSettings(runs=[recorded_run], port=port))
    with pytest.raises(SettingError, match="no run is named"):
        watch.run(WatchSettings())
    with pytest.raises(RunError, match="not a run folder"):
        watch.run(WatchSettings(runs=[tmp_path]))
