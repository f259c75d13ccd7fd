"""A family that nobody has published, with a VAE of its own, goes wherever only the geometry is asked for.

Its latent frames stand for two frames where CogVideoX's stand for four, so it takes 13 frames, which CogVideoX does
not; its latents have 12 channels of 4 x 4 pixels each.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from cogcommon.errors import SettingError
from cogcommon.media.video import write_mp4
from cogcommon.model import families
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, FAMILIES, Resolution
from cogprep.commands.validate import validate
from cogprep.commands.verdict import show
from cogprep.commands.verify import expected_shapes
from cogprep.settings import encode as encode_settings
from cogprep.settings import shards as shards_settings
from cogprep.settings.encode import ValidateSettings
from cogprep.settings.shards import PreviewSettings
from cogtrain.blocks.load import Load

SIXTH = replace(
    BY_NAME["5b"], name="sixth", temporal=2, spatial=4, latent_channels=12, text_tokens=100, fps=12, max_frames=53,
    native=Resolution(13, 64, 96),
)  # fmt: skip


@pytest.fixture
def sixth(monkeypatch):
    """A checkpoint of it: tiny's, for all that is not geometry."""
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, SIXTH))
    monkeypatch.setitem(BY_NAME, SIXTH.name, SIXTH)
    monkeypatch.setattr(shards_settings, "FAMILIES", (*FAMILIES, SIXTH))
    checkpoint = replace(open_checkpoint("tiny"), name="sixth", family=SIXTH)
    for opener in ("open_checkpoint", "known_checkpoint"):
        monkeypatch.setattr(encode_settings, opener, lambda name: checkpoint)
    return checkpoint


def test_sizes_are_those_of_the_row(sixth):
    size = Resolution.parse("13x64x88")
    assert SIXTH.latent(size) == (12, 7, 16, 22)
    assert SIXTH.tokens(size) == 7 * 8 * 11 + 100
    sixth.check_resolution(size)
    with pytest.raises(SettingError, match=r"13 frames: CogVideoX takes 8N\+1 frames \(9, 17, 25, ... 49, ...\)"):
        open_checkpoint("tiny").check_resolution(size)
    with pytest.raises(SettingError, match=r"11 frames") as caught:
        Resolution.parse("11x64x96")  # no family's
    assert caught.value.fix == "--resolution 9x64x96 or 17x64x96"
    with pytest.raises(
        SettingError, match=r"11 frames: CogVideoX takes 4N\+1 frames \(5, 9, 13, ... 25, ...\)"
    ) as caught:
        sixth.check_resolution(Resolution(11, 64, 96))
    assert caught.value.fix == "--resolution 9x64x96 or 13x64x96"
    with pytest.raises(SettingError, match="width 90 is not a multiple of 8"):
        sixth.check_resolution(Resolution(13, 64, 90))
    with pytest.raises(SettingError, match="57 frames: sixth takes at most 53"):
        sixth.check_resolution(Resolution(57, 64, 96))
    assert PreviewSettings(frames=13).frames == 13
    with pytest.raises(SettingError, match=r"13 frames") as caught:
        PreviewSettings(frames=13).check_frames((BY_NAME["5b"],))
    assert caught.value.fix == "--frames 9 or 17"


def test_without_its_row_its_sizes_are_nobodys():
    with pytest.raises(SettingError, match="13 frames: CogVideoX takes 8N"):
        Resolution.parse("13x64x96")


def test_clips_are_cut_planned_and_counted_by_the_row(sixth, tmp_path):
    root = tmp_path / "ds"
    root.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (30, 72, 104, 3), np.uint8)
    write_mp4(root / "long.mp4", frames, 12)
    write_mp4(root / "short.mp4", frames[:10], 12)
    (root / "videos.txt").write_text("long.mp4\nshort.mp4\n")
    (root / "prompts.txt").write_text("noise that lasts\nnoise that does not\n")
    settings = ValidateSettings(
        data_root=root, out=tmp_path / "out", resolution=["13x64x88", "5x64x88"], model="sixth", workers=1,
        precision="fp32", frames="fps",
    )  # fmt: skip
    verdict = validate(settings)
    assert not verdict.faults
    rows = {str(row.resolution): row for row in verdict.plan}
    assert {size: row.clips for size, row in rows.items()} == {"13x64x88": 1, "5x64x88": 1}
    assert rows["13x64x88"].fps == pytest.approx((12, 12))
    text = 4 * 100 * sixth.text_config["d_model"]
    assert rows["13x64x88"].bytes == 4 * 2 * 12 * 7 * 16 * 22 + text
    assert rows["5x64x88"].bytes == 4 * 2 * 12 * 3 * 16 * 22 + text
    show(verdict, Console(file=(said := io.StringIO()), width=200))
    assert "13x64x88" in said.getvalue() and "sixth, 12 fps" in said.getvalue()


def test_shards_and_loads_have_its_shapes(sixth, tmp_path, make_shards):
    from cogcommon.shards.contract import CONTRACT_FILE, Contract

    make_shards(tmp_path, samples=1)
    contract = Contract.from_json((tmp_path / CONTRACT_FILE).read_bytes(), where="test")
    contract = replace(contract, family=SIXTH.name, text_tokens=100, settings={"resolution": ["13x64x88"]})
    assert expected_shapes("13x64x88", contract)["latent_mean"] == (12, 7, 16, 22)
    assert Contract.from_json(contract.to_json(), where="test").buckets == [Resolution(13, 64, 88)]
    with pytest.raises(Exception, match="not a shard contract: 13 frames"):
        Contract.from_json(replace(contract, family="5b").to_json(), where="test")
    load = Load.of(sixth.transformer_config, SIXTH.tokens(Resolution(13, 64, 88)), batch=1, size=2, trained=0)
    width = sixth.transformer_config["num_attention_heads"] * sixth.transformer_config["attention_head_dim"]
    assert load.activation == (7 * 8 * 11 + 100) * width * 2
