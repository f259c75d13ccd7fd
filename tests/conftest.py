"""Fixtures that several sides use: the built-in models, and small real shards without an encode."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from places import CHILDREN

from cogcommon import __version__
from cogcommon.files.atomic import commit_bytes
from cogcommon.model.checkpoint import Checkpoint, open_checkpoint
from cogcommon.model.families import Resolution
from cogcommon.model.tiny import NATIVE
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import SampleRow, tar_name

ShardMaker = Callable[..., list[Path]]
FULL_DISK = CHILDREN / "full_disk.c"


@pytest.fixture(scope="session", autouse=True)
def _one_cpu_device() -> None:
    from cogcommon.libraries import quiet_libraries
    from cogcommon.model.device import pick_device

    pick_device()
    quiet_libraries()


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """A shell starts a background job, such as this one may be, deaf to SIGINT, and its children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def full_disk(tmp_path_factory) -> Callable[..., dict[str, str]]:
    """``full_disk(pattern="", n=1) -> environment`` of a process whose disk is full from its n-th write on.

    See full_disk.c.
    """
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to compile the layer in front of libc with")
    library = tmp_path_factory.mktemp("full_disk") / "full_disk.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(FULL_DISK), "-ldl"], check=True)

    def environment(pattern: str = "", n: int = 1) -> dict[str, str]:
        return os.environ | {"LD_PRELOAD": str(library), "FULL_DISK": pattern, "FULL_DISK_FROM": str(n)}

    return environment


@pytest.fixture(scope="session")
def make_shards() -> ShardMaker:
    """``make_shards(folder, form="tiny", ...) -> tars``; see `commit_random_shards`."""
    return write_random_shards


@pytest.fixture(scope="session")
def shards_to_come() -> Callable[..., Iterator[Path]]:
    """As `make_shards`, but each ``next`` commits one."""
    return commit_random_shards


def write_random_shards(*args: object, **options: object) -> list[Path]:
    """The tars of `commit_random_shards`, all of them committed."""
    return list(commit_random_shards(*args, **options))  # type: ignore[arg-type]


def commit_random_shards(
    folder: Path,
    form: str = "tiny",
    *,
    resolutions: tuple[Resolution, ...] = (NATIVE,),
    samples: int = 6,
    per_shard: int = 2,
    posterior: str = "moments",
    image_variants: int = 2,
    captions: tuple[str, ...] = (),
    captions_each: int = 1,
    more: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Commit shards of random latents with the real writer, as an encode with a built-in form would, one after another.

    Args:
        folder: made if missing.
        form: built-in form; an I2V form gets image latents.
        resolutions: one bucket each; every bucket gets ``samples`` samples.
        samples: in each bucket.
        per_shard: samples a shard; a shard never mixes buckets.
        posterior: "moments" or "sample".
        image_variants: pre-noised image latents (I2V).
        captions: used in turn; "caption N" when empty.
        captions_each: so many samples in a row are captions of one clip.
        more: shapes of further tensors, by name.
        seed: of all random tensors.
        settings: of the encode, beside the resolutions.

    Yields:
        Each tar, once it is committed. contract.json and the empty caption lie beside them.
    """
    import safetensors.torch
    import torch

    from cogprep.store.shards import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(form)
    generator = torch.Generator().manual_seed(seed)
    text_dim = checkpoint.text_config["d_model"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    empty = safetensors.torch.save({"text": normal(checkpoint.family.text_tokens, text_dim)})
    contract = random_contract(checkpoint, resolutions, posterior, image_variants)
    contract = dataclasses.replace(
        contract,
        empty_caption_sha256=hashlib.sha256(empty).hexdigest(),
        settings={**contract.settings, **(settings or {})},
    )
    commit_bytes(folder / EMPTY_CAPTION_FILE, empty)
    commit_bytes(folder / CONTRACT_FILE, contract.to_json().encode())

    line = number = 0
    for resolution in resolutions:
        latent = checkpoint.family.latent(resolution)
        still = latent.still
        for start in range(0, samples, per_shard):
            writer = ShardWriter(folder, number, contract, ())
            for _ in range(start, min(start + per_shard, samples)):
                line += 1
                tensors = {"latent_mean": normal(*latent), "text": normal(checkpoint.family.text_tokens, text_dim)}
                if checkpoint.family.task == "i2v":
                    tensors["image_mean"] = normal(image_variants, *still)
                    tensors["image_clean_mean"] = normal(*still)
                if posterior == "moments":
                    stds = {name.replace("_mean", "_std"): t for name, t in tensors.items() if name != "text"}
                    tensors |= {name: torch.rand(t.shape, generator=generator) * 0.1 for name, t in stds.items()}
                caption = captions[(line - 1) % len(captions)] if captions else f"caption {line}"
                tensors |= {name: normal(*shape) for name, shape in (more or {}).items()}
                clip = f"{contract.fingerprint} clip {(line - 1) // captions_each}".encode()
                row = _row(contract, line, caption, resolution)
                if captions_each > 1:
                    row = dataclasses.replace(row, source_sha256=hashlib.sha256(clip).digest())
                writer.add(row, tensors)
            writer.commit()
            yield folder / tar_name(number)
            number += 1


def random_contract(
    checkpoint: Checkpoint, resolutions: tuple[Resolution, ...], posterior: str, image_variants: int
) -> Contract:
    family = checkpoint.family
    return Contract(
        family=family.name,
        task=family.task,
        model=checkpoint.name,
        revision=checkpoint.revision,
        vae=checkpoint.identity("vae"),
        text_encoder=checkpoint.identity("text_encoder"),
        scaling_factor=checkpoint.vae_config["scaling_factor"],
        posterior=posterior,  # type: ignore[arg-type]
        image_variants=image_variants if family.task == "i2v" else 0,
        tiling="off",
        dtype="float32",
        text_tokens=family.text_tokens,
        text_dim=checkpoint.text_config["d_model"],
        settings={"resolution": [str(resolution) for resolution in resolutions]},
        tool_version=__version__,
    )


def _row(contract: Contract, line: int, caption: str, resolution: Resolution) -> SampleRow:
    content = hashlib.sha256(f"{contract.fingerprint} {line} {caption}".encode())
    return SampleRow(
        key=content.hexdigest()[:32],
        status="ok",
        bucket=str(resolution),
        caption=caption,
        caption_tokens=3,
        caption_truncated=False,
        source=f"videos/{line:02d}.mp4",
        source_line=line,
        source_size=1000,
        source_mtime_ns=0,
        source_sha256=content.digest(),
        image="",
        image_sha256=b"",
        frames=list(range(resolution.frames)),
        effective_fps=8.0,
        crop_box=[0, 0, resolution.width, resolution.height],
        colour="bt709 limited (tagged)",
        tiled=False,
    )


@pytest.fixture
def live_model() -> Callable:
    """live_model(name, **attach options) -> checkpoint, transformer with a LoRA whose B is not zero.

    alpha/rank is 0.25: lost, the adapter acts four times too strongly.
    """

    import torch

    from cogtrain.model import lora

    def make(name="random-tiny", **options):
        checkpoint = open_checkpoint(name)
        transformer = checkpoint.load_transformer(torch.float32)
        lora.attach(transformer, **({"rank": 4, "alpha": 1.0} | options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(transformer.named_parameters()):
                if parameter.requires_grad and (parameter == 0).all():
                    parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
        return checkpoint, transformer

    return make


@pytest.fixture(scope="module")
def browser():
    """Chromium, by selenium; tests that need it are skipped where there is none."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium (apt install chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    autoplay = "--autoplay-policy=no-user-gesture-required"
    for word in ("--headless=new", "--no-sandbox", "--window-size=1280,1600", autoplay):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield found
    found.quit()
