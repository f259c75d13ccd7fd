"""The engines as a command takes them: what is refused, before anything is connected."""

from __future__ import annotations

from typing import get_args

import pytest

from cogcommon.errors import SettingError
from cogprep.engines import ray_engine
from cogprep.engines.table import ENGINES
from cogprep.settings import EngineName


@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        ({"ray_address": "ray://head:10001"}, "client", "on a host of the cluster"),
        ({"gpus": "2"}, "every GPU", "leave --gpus out"),
        ({"worker": "1/4"}, "one driver", "leave --worker out"),
    ],
)
def test_what_the_ray_engine_refuses(run_encode, given, what, fix):
    with pytest.raises(SettingError, match=what) as caught:
        run_encode(engine="ray", **given)
    assert fix in caught.value.fix


def test_one_driver_and_not_one_a_task(run_encode, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SettingError, match="one driver") as caught:
        run_encode(engine="ray")
    assert "slice 2/4" in caught.value.where


def test_without_ray_the_error_says_how_to_install_it(run_encode, monkeypatch):
    monkeypatch.setattr(ray_engine, "find_spec", lambda _name: None)
    with pytest.raises(SettingError, match="not installed") as caught:
        run_encode(engine="ray")
    assert caught.value.fix == 'pip install "cogtune[ray]"'


def test_every_engine_that_can_be_named_is_there():
    assert set(ENGINES) == set(get_args(EngineName))
