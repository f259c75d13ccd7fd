"""Captions to embeddings, where the device is too small for T5."""

import torch

from cogcommon.model.checkpoint import open_checkpoint
from cogprep.encode import captions


def test_a_device_too_small_for_t5_gets_a_layer_at_a_time(monkeypatch, capsys):
    checkpoint = open_checkpoint("random-tiny")
    cpu = torch.device("cpu")
    whole = captions.TextEncoder(checkpoint, cpu, torch.float32)
    expected, facts = whole.encode("a red ball rolls down a hill")
    monkeypatch.setattr(captions, "_free", lambda _device: 1 << 20)
    small = captions.TextEncoder(checkpoint, cpu, torch.float32)
    assert all(parameter.is_meta for parameter in small._model.parameters())  # nothing stays on the device
    found, found_facts = small.encode("a red ball rolls down a hill")
    assert torch.equal(found, expected) and found_facts == facts
    assert "one layer at a time" in capsys.readouterr().err
