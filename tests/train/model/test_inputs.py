"""What is fed to the transformer, against diffusers' own pipelines and an independent statement of the loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, FAMILIES, Resolution
from cogtrain.model import lora
from cogtrain.model.batch import Batch
from cogtrain.model.objective import Objective, region_within

FORMS = [family.builtin for family in FAMILIES]
NATIVE = Resolution(17, 64, 96)
PICTURE = Resolution(1, 64, 96)  # a clip of one frame
PICTURES = [(family.builtin, PICTURE) for family in FAMILIES if family.task == "t2v"]
OTHERS = [Resolution(9, 96, 64), Resolution(25, 80, 80), Resolution(17, 48, 160)]
SIZES = [(form, size) for form in FORMS for size in [NATIVE, *(OTHERS if form != "tiny-i2v" else [])]]
SIZES += PICTURES


def random_batch(checkpoint, size=NATIVE, batch=2, dtype=torch.float64, timesteps=(3, 700), seed=0):
    generator = torch.Generator().manual_seed(seed)
    family = checkpoint.family
    channels, frames, *plane = family.latent(size)
    shape = (batch, frames, channels, *plane)
    padded = (batch, family.padded_frames(frames), channels, *plane)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Batch(
        keys=tuple("ab"[:batch]),
        shards=("s",) * batch,
        latent_BFCHW=normal(*shape),
        noise_BFCHW=normal(*padded),
        timestep_B=torch.tensor(timesteps[:batch]),
        text_BLD=normal(batch, family.text_tokens, 64),
        conditions={"image": normal(batch, 1, *shape[2:])} if family.task == "i2v" else {},
    )


@pytest.mark.parametrize(("form", "size"), SIZES, ids=lambda value: str(value))
def test_inputs_are_what_the_pipeline_feeds(form, size, monkeypatch):
    import diffusers

    checkpoint = open_checkpoint(form)
    i2v = checkpoint.family.task == "i2v"
    cls = diffusers.CogVideoXImageToVideoPipeline if i2v else diffusers.CogVideoXPipeline
    pipeline = cls.from_pretrained(checkpoint.root)
    pipeline.set_progress_bar_config(disable=True)
    fed = {}
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda **named: fed.update(named) or forward(**named))
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, checkpoint.family.text_tokens, 64, generator=generator)
    image_latent = torch.randn(1, *checkpoint.family.latent(size).still, generator=generator)
    options = {}
    if i2v:
        # A known latent for the image, unscaled as the VAE gives it.
        monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: SimpleNamespace(latents=image_latent))
        options["image"] = torch.zeros(1, 3, size.height, size.width)
    pipeline(
        prompt_embeds=text, height=size.height, width=size.width, num_frames=size.frames, num_inference_steps=1,
        guidance_scale=1.0, output_type="latent", generator=generator, **options,
    )  # fmt: skip
    objective = Objective.of(checkpoint)
    noisy = fed["hidden_states"][:, :, :16]
    conditions = {"image": image_latent.transpose(1, 2)} if i2v else {}
    ours = objective.model_inputs(noisy, conditions, text, fed["timestep"], torch.float32)
    assert noisy.shape[1] == objective.family.padded_frames(checkpoint.family.latent(size).frames)
    torch.testing.assert_close(ours["hidden_states"], fed["hidden_states"], rtol=1e-6, atol=0)
    assert torch.equal(ours["encoder_hidden_states"], fed["encoder_hidden_states"])
    for name in ("ofs",):
        theirs = fed.get(name)
        assert (ours[name] is None) == (theirs is None)
        assert theirs is None or torch.equal(ours[name], theirs)
    if fed["image_rotary_emb"] is None:
        assert ours["image_rotary_emb"] is None
    else:
        assert all(torch.equal(a, b) for a, b in zip(ours["image_rotary_emb"], fed["image_rotary_emb"], strict=True))
    # The whole of it goes through the transformer.
    pipeline.transformer(**ours)


@pytest.mark.parametrize("form", FORMS)
def test_latents_are_padded_at_the_front_and_the_pipeline_drops_what_was_added(form):
    checkpoint = open_checkpoint(form)
    objective = Objective.of(checkpoint)
    latent = torch.randn(1, 5, 16, 4, 4)
    clean = objective.clean(latent)
    factor = BY_NAME[checkpoint.family.name].scaling_factor
    added = clean.shape[1] - 5
    assert added == (1 if checkpoint.family.patch_t else 0)
    torch.testing.assert_close(clean[:, added:], latent * factor)
    assert torch.equal(clean[:, 0], latent[:, 0] * factor)


def own_rope(checkpoint, size):
    """Rotary tables written down once more, in numpy and fp64, from the papers' formula."""
    config = checkpoint.transformer_config
    _, frames, height, width = checkpoint.family.latent(size)
    rows, columns = height // 2, width // 2
    if config["patch_size_t"]:
        frames = (frames + 1) // 2
        axis_h, axis_w = np.arange(rows), np.arange(columns)
    else:
        base_h, base_w = config["sample_height"] // 2, config["sample_width"] // 2
        # Fit the grid into the base one, keeping its shape, in the middle.
        if rows / columns > base_h / base_w:
            fit_h, fit_w = base_h, round(base_h / rows * columns)
        else:
            fit_h, fit_w = round(base_w / columns * rows), base_w
        top, left = round((base_h - fit_h) / 2), round((base_w - fit_w) / 2)
        axis_h = np.linspace(top, (top + fit_h) * (rows - 1) / rows, rows)
        axis_w = np.linspace(left, (left + fit_w) * (columns - 1) / columns, columns)
    dim = config["attention_head_dim"]
    tables = []
    for axis, width in ((np.arange(frames), dim // 4), (axis_h, dim // 8 * 3), (axis_w, dim // 8 * 3)):
        angle = np.outer(axis, 10000.0 ** (-np.arange(0, width, 2) / width))
        tables.append(np.repeat(angle, 2, axis=1))
    t, h, w = tables
    angles = np.concatenate(
        [
            np.broadcast_to(t[:, None, None], (frames, rows, columns, t.shape[1])),
            np.broadcast_to(h[None, :, None], (frames, rows, columns, h.shape[1])),
            np.broadcast_to(w[None, None, :], (frames, rows, columns, w.shape[1])),
        ],
        axis=3,
    ).reshape(frames * rows * columns, -1)
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def own_loss(checkpoint, transformer, batch, size):
    """The reference's form of the loss, x0 weighted by 1/(1-abar), sample by sample in fp64."""
    family = BY_NAME[checkpoint.family.name]
    steps = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    abar = np.cumprod(1 - steps)
    abar = abar / (family.snr_shift + (1 - family.snr_shift) * abar)
    root = np.sqrt(abar)
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    total = 0
    for index, t in enumerate(batch.timestep_B.tolist()):
        frames = [frame * family.scaling_factor for frame in batch.latent_BFCHW[index]]
        if family.patch_t and len(frames) % 2:
            frames.insert(0, frames[0])
        x0 = torch.stack(frames)
        a = float(abar[t])
        noisy = math.sqrt(a) * x0 + math.sqrt(1 - a) * batch.noise_BFCHW[index]
        fed = noisy
        if family.task == "i2v":
            image = batch.conditions["image"][index, 0]
            image = image / family.scaling_factor if family.invert_image_scale else image * family.scaling_factor
            stills = [image] + [torch.zeros_like(image)] * (len(frames) - 1)
            fed = torch.cat([noisy, torch.stack(stills)], dim=1)
        out = transformer(
            hidden_states=fed[None],
            encoder_hidden_states=batch.text_BLD[index : index + 1],
            timestep=torch.tensor([t]),
            ofs=torch.tensor([2.0], dtype=torch.float64) if family.ofs else None,
            image_rotary_emb=None if family.positions == "sincos" else own_rope(checkpoint, size),
            return_dict=False,
        )[0][0]
        x0_predicted = math.sqrt(a) * noisy - math.sqrt(1 - a) * out
        total = total + ((x0_predicted - x0) ** 2).mean() / (1 - a)
    return total / len(batch.timestep_B)


@pytest.mark.parametrize(
    ("form", "size"), [(form, NATIVE) for form in FORMS] + [("tiny", OTHERS[1])] + PICTURES, ids=str
)
def test_loss_and_gradients_equal_an_independent_statement(form, size):
    checkpoint = open_checkpoint(form)
    transformer = checkpoint.load_transformer(torch.float64)
    lora.attach(transformer, 4, 2)
    transformer.to(torch.float64)
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05)
    batch = random_batch(checkpoint, size)

    ours = Objective.of(checkpoint).losses(transformer, batch, torch.float64).mean()
    our_gradients = torch.autograd.grad(ours, list(trained.values()))
    theirs = own_loss(checkpoint, transformer, batch, size)
    their_gradients = torch.autograd.grad(theirs, list(trained.values()))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, a, b in zip(trained, our_gradients, their_gradients, strict=True):
        assert b.norm() > 0, name
        assert float((a - b).norm() / b.norm()) < 1e-6, name


@pytest.mark.parametrize("t", [0, 1])
def test_a_bf16_model_at_the_first_timesteps(t):
    """Trap: with bf16 coefficients no noise is added here, and the loss is 0 or 12 times off."""
    checkpoint = open_checkpoint("tiny")
    batch = random_batch(checkpoint, dtype=torch.float32, timesteps=(t, t))
    half = checkpoint.load_transformer(torch.bfloat16)
    with torch.no_grad():
        got = Objective.of(checkpoint).losses(half, batch, torch.bfloat16)
        exact = Objective.of(checkpoint).losses(checkpoint.load_transformer(torch.float32), batch, torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0)


def test_min_snr_weighs_each_sample_by_its_timestep():
    checkpoint = open_checkpoint("tiny")
    transformer = checkpoint.load_transformer(torch.float32)
    batch = random_batch(checkpoint, dtype=torch.float32, timesteps=(5, 900))
    with torch.no_grad():
        plain = Objective.of(checkpoint).losses(transformer, batch, torch.float32)
        weighted = Objective.of(checkpoint, 5.0).losses(transformer, batch, torch.float32)
    abar = Objective.of(checkpoint).schedule.abar_T[batch.timestep_B]
    snr = abar / (1 - abar)
    torch.testing.assert_close(weighted / plain, (snr.clamp(max=5) / (snr + 1)).float(), rtol=1e-5, atol=0)


def test_positions_stretch_over_the_region_that_diffusers_takes():
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    for base in ((30, 45), (48, 85), (4, 6)):
        for height in range(1, 60):
            for width in range(1, 100):
                grid = (height, width)
                assert region_within(grid, base) == get_resize_crop_region_for_grid(grid, base[1], base[0])
