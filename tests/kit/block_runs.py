"""Small transformers whose blocks run in our own way: their loss and gradients, and copies made as late as allowed."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from cogcommon.model.checkpoint import open_checkpoint
from cogtrain.model import lora
from cogtrain.model.objective import Objective

FORMS = ["tiny", "tiny-2b", "tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"]
CPU = torch.device("cpu")
LAYERS = 5  # streaming has two slots: with five blocks each is used again, forward and backward


def transformer_of(form, method, layers=LAYERS):
    from diffusers import CogVideoXTransformer3DModel

    checkpoint = open_checkpoint("random-" + form)
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel.from_config(dict(checkpoint.transformer_config) | {"num_layers": layers})
    if method == "lora":
        lora.attach(transformer, 4, 2.0)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.requires_grad and (parameter == 0).all():
                    parameter.normal_(std=0.3)
    return checkpoint, transformer.train()


def loss_of(checkpoint, transformer, dtype=torch.float32, batch=2, device=CPU):
    """Loss of one fixed batch."""
    objective = Objective.of(checkpoint)
    config = checkpoint.transformer_config
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    conditions = {name: normal(batch, 1, 16, 8, 12) for name in checkpoint.family.conditions}
    inputs = objective.model_inputs(
        normal(batch, objective.family.padded_frames(5), 16, 8, 12),
        conditions,
        normal(batch, config["max_text_seq_length"], config["text_embed_dim"]),
        torch.tensor([300, 700])[:batch].to(device),
        dtype,
    )
    transformer.zero_grad()
    return transformer(**inputs, return_dict=False)[0].float().square().mean()


def gradients(checkpoint, transformer, dtype=torch.float32, batch=2, device=CPU):
    """Loss, and each trained weight's gradient, of one fixed batch."""
    loss = loss_of(checkpoint, transformer, dtype, batch, device)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}


def farthest(expected, got):
    assert expected[1].keys() == got[1].keys()
    losses = abs(expected[0] - got[0]) / expected[0]
    largest = {name: g.abs().max().item() for name, g in expected[1].items()}
    # A gradient may be zero but for rounding: to add the same to all keys, where nothing turns them, changes nothing.
    least = 1e-6 * max(largest.values())
    return max(
        losses,
        *((got[1][name] - g).abs().max().item() / max(largest[name], least) for name, g in expected[1].items()),
    )


def lent(tensor):
    return (
        StorageWeakRef(tensor.untyped_storage()),
        tensor.dtype,
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )


def held(storage, dtype, *place):
    assert not storage.expired(), "its memory was let go of before the copy was waited for"
    return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_with_weak_ptr(storage.cdata), *place)


class LateCopies:
    """Copies made as late as their order allows: when the computation is told to wait for them, or never.

    They hold neither end: as on a GPU, memory that nobody else holds any more is another's by then.
    """

    def __init__(self, device):
        self.made = 0

    def copy(self, target, source, after=None):
        def make():
            if after is not None:
                after()
            if not done:
                done.append(True)
                self.made += 1
                held(*into).copy_(held(*whence))

        done, into, whence = [], lent(target), lent(source)
        return make

    def compute_after(self, event):
        if event is not None:
            event()
