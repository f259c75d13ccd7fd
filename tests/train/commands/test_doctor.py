"""``cogtrain doctor``: it says what matters of a machine, and what to do about what is wrong."""

import json
import shutil
import socket
from functools import partial
from threading import Thread

import pytest
import torch
from huggingface_hub import constants

from cogtrain.commands import doctor
from cogtrain.settings.planning import DoctorSettings


def about(findings, name):
    return next(finding for finding in findings if finding.about == name)


def test_it_says_what_is_here(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    looked = list(doctor.findings())  # once: free memory and disk change from one look to the next
    monkeypatch.setattr(doctor, "findings", lambda: looked)
    doctor.run(DoctorSettings(json=True))
    found = json.loads(capsys.readouterr().out)
    assert {"python, torch", "GPU", "host memory", "C++ compiler", "disk", "models", "ffmpeg"} <= {
        line["about"] for line in found
    }
    assert all(line["advice"] for line in found if line["verdict"] != "good")
    doctor.run(DoctorSettings())
    said = capsys.readouterr().out
    assert all(line["found"] in said and line["advice"] in said for line in found)


def test_libraries_that_are_compiled_at_each_start_are_named(monkeypatch, tmp_path):
    assert not list(doctor._bytecode())
    monkeypatch.setattr(doctor, "cache_from_source", lambda file: str(tmp_path / "none.pyc"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (finding,) = doctor._bytecode()
    assert finding.verdict == "note"
    assert "compileall" in finding.advice
    assert "PYTHONDONTWRITEBYTECODE" in finding.advice


@pytest.mark.parametrize(
    ("cuda", "driver", "hidden", "verdict", "told"),
    [
        (None, None, None, "note", "--model tiny"),
        (None, "/usr/bin/nvidia-smi", None, "bad", "build for CUDA"),
        ("13.0", "/usr/bin/nvidia-smi", "", "bad", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, None, "note", "--gpus all"),
        ("13.0", "/usr/bin/nvidia-smi", None, "bad", "new enough for CUDA 13.0"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, cuda, driver, hidden, verdict, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: driver if name == "nvidia-smi" else f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = about(doctor.findings(), "GPU")
    assert finding.verdict == verdict and told in finding.advice


def answer_once(server):
    with server.accept()[0] as connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_models_that_cannot_be_fetched_are_wrong_only_where_none_is_here(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert about(doctor.findings(), "models").verdict == "bad"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "is_reached", partial(doctor.is_reached, patience=100))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        answering = Thread(target=answer_once, args=(server,))
        answering.start()
        assert about(doctor.findings(), "models").verdict == "good"
        answering.join()
    silent = about(doctor.findings(), "models")  # nobody listens there any more
    assert silent.verdict == "bad" and "cannot be reached" in silent.found and "HF_ENDPOINT" in silent.advice


def test_what_flash_attention_4_brings_is_what_was_measured():
    gains = {name: (slow, fast) for name, slow, fast in doctor.flash4_gains()}
    assert {"5b", "1.5-5b"} <= set(gains) and all(fast < slow for slow, fast in gains.values())
