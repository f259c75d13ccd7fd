"""Compares two transformers by their outputs for one fixed input, and a transformer with what it was by its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogcommon.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from diffusers import CogVideoXTransformer3DModel


def output_on_noise(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    """A transformer's output for one fixed input; fp32, on the CPU.

    For comparing two sets of weights: the input is as small as the structure
    allows, and RoPE, which has no weights, is left out. Under ZeRO-3
    call it on every rank.
    """
    import torch

    config = transformer.config
    device = next(transformer.parameters()).device
    dtype = transformer.patch_embed.text_proj.weight.dtype
    learned = config.use_learned_positional_embeddings  # these exist at one height and width only
    height, width = (config.sample_height, config.sample_width) if learned else (8, 8)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    latent_BFCHW = normal(1, config.patch_size_t or 1, config.in_channels, height, width)
    text_BLD = normal(1, config.max_text_seq_length, config.text_embed_dim)
    was_training = transformer.training
    transformer.eval()
    with torch.no_grad():
        output = transformer(
            hidden_states=latent_BFCHW,
            encoder_hidden_states=text_BLD,
            timestep=torch.tensor([500], device=device),
            ofs=normal(1) if config.ofs_embed_dim else None,
            return_dict=False,
        )[0]
    transformer.train(was_training)
    return output.float().cpu()


class Frozen:
    """The weights that training leaves as they are, told by the sums of their bits.

    A sum for each row of each weight, where the weight lies: milliseconds for 10 GB on a GPU, a few bytes in a
    thousand.
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        self._sums = dict(_sums(transformer))

    def changed(self, transformer: torch.nn.Module) -> list[str]:
        """Names of the weights that are no longer what they were, or no longer there."""
        import torch

        now = dict(_sums(transformer))
        same = {name for name in now.keys() & self._sums.keys() if torch.equal(now[name].cpu(), self._sums[name].cpu())}
        return sorted((now.keys() | self._sums.keys()) - same)


def _sums(transformer: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for name, parameter in transformer.named_parameters():
        if not parameter.requires_grad:
            rows = parameter.detach().reshape(len(parameter) if parameter.ndim > 1 else 1, -1)
            try:
                bits = rows.view(torch.int64)
            except RuntimeError:  # rows of another length than whole words, or that begin elsewhere
                bits = rows.contiguous().view(torch.uint8)
            yield name, bits.sum(1, dtype=torch.int64)


def difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((expected - got).abs().max() / expected.abs().max())


def limit(dtype: torch.dtype) -> float:
    """The `difference` above which two models cannot be the same.

    In half precision one flipped rounding travels through 42 layers, and the
    live model may compute under autocast; there this is a gross check beside
    the exact one of the weights.
    """
    import torch

    return 1e-5 if dtype == torch.float32 else 0.1


def check_answer(
    loaded: CogVideoXTransformer3DModel, wrong: Sequence[str], expected: torch.Tensor, dtype: torch.dtype,
    *, what: str, where: Path,
) -> float:  # fmt: skip
    """Hold what was loaded back against what was trained: its weights, and one forward pass.

    Args:
        wrong: names of weights that are others than those that were trained; compared exactly.
        expected: `output_on_noise` of the live model.
        dtype: the type that both were computed in.
        what: was loaded, for the message.
        where: it lies.

    Returns:
        The `difference` of the forward pass: about 1e-7 in fp32.

    Raises:
        RunError: it is not what was trained.
    """
    found = difference(expected, output_on_noise(loaded))
    if wrong or not found <= limit(dtype):
        raise RunError(
            f"the exported {what} does not answer as the trained model does: {len(wrong)} weights act otherwise, "
            f"the forward pass is {found:.1e} off, {limit(dtype):.0e} allowed",
            where=str(where),
            fix="do not use it; the checkpoints of the run still hold the weights: `cogtrain export --run RUN`",
        )
    return found
