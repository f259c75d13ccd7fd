"""T5 on a device that is too small for it."""

import torch

from cogcommon.model import text_encoder
from cogcommon.model.checkpoint import open_checkpoint


def test_a_device_too_small_for_t5_gets_a_layer_at_a_time(monkeypatch, capsys):
    checkpoint = open_checkpoint("random-tiny")
    cpu = torch.device("cpu")
    whole = text_encoder.TextEncoder(checkpoint, cpu, torch.float32)
    expected, facts = whole.encode("a red ball rolls down a hill")
    monkeypatch.setattr(text_encoder, "_free", lambda _device: 1 << 20)
    small = text_encoder.TextEncoder(checkpoint, cpu, torch.float32)
    assert all(parameter.is_meta for parameter in small._model.parameters())  # nothing stays on the device
    found, found_facts = small.encode("a red ball rolls down a hill")
    assert torch.equal(found, expected) and found_facts == facts
    assert "one layer at a time" in capsys.readouterr().err
