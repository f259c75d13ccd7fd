import json
import shutil

import huggingface_hub
import pytest
import torch

from cogcommon.errors import ModelError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BUILTIN_NAMES
from cogcommon.model.published import scaled_otherwise


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "copy"
    shutil.copytree(open_checkpoint("tiny").root, folder)
    return folder


def test_the_built_in_model_is_the_same_every_time(tmp_path, monkeypatch):
    first = open_checkpoint("tiny")
    monkeypatch.setenv("COGTUNE_CACHE", str(tmp_path))
    second = open_checkpoint("tiny")
    assert second.root.parent == tmp_path
    for part in ("vae", "text_encoder", "transformer"):
        assert first.identity(part) == second.identity(part)
    assert not list(tmp_path.glob(".*")), "no scratch folder stays behind"


def test_forms_share_their_vae_weights_but_not_its_scale():
    vae_5b, vae_2b = (open_checkpoint(name).identity("vae") for name in ("tiny", "tiny-2b"))
    assert vae_5b.weights_sha256 == vae_2b.weights_sha256
    assert vae_5b.config_sha256 != vae_2b.config_sha256


def test_a_local_folder_is_a_checkpoint_with_the_same_identity(copied):
    here, there = open_checkpoint("tiny"), open_checkpoint(str(copied))
    assert there.family is here.family
    assert there.identity("vae").weights_sha256 == here.identity("vae").weights_sha256


def test_identity_sees_a_changed_weight_and_a_changed_config(copied, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(copied, folder)
    before = open_checkpoint(str(folder)).identity("vae")
    weights = next((folder / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    after = open_checkpoint(str(folder)).identity("vae")
    assert after.weights_sha256 != before.weights_sha256
    assert after.config_sha256 != before.config_sha256


def test_a_folder_with_a_part_missing_says_which(copied, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(copied, folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"scheduler/scheduler_config\.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("value", [None, 0, "3", float("inf")])
def test_a_scheduler_without_its_snr_shift_is_refused(copied, tmp_path, value):
    """Diffusers' scheduler would take 3 in the place of none, which is 2B's alone."""
    folder = tmp_path / "shift"
    shutil.copytree(copied, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text()) | {"snr_shift_scale": value}
    config.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(ModelError, match=r"scheduler/snr_shift_scale of .* is ") as caught:
        open_checkpoint(str(folder))
    assert caught.value.where == str(config) and "THUDM/CogVideoX-5b" in caught.value.fix


def test_a_folder_that_scales_otherwise_than_its_family_is_told(copied, tmp_path):
    folder = tmp_path / "otherwise"
    shutil.copytree(copied, folder)
    assert scaled_otherwise(open_checkpoint(str(folder))) == []
    for file, changes in (
        ("vae/config.json", {"scaling_factor": 0.9, "invert_scale_latents": True}),  # of image latents alone
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    (note,) = scaled_otherwise(open_checkpoint(str(folder)))
    assert "vae/scaling_factor 0.9 (0.7 in THUDM/CogVideoX-5b), scheduler/snr_shift_scale 3.0 (1.0 in" in note
    assert "invert" not in note


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_a_built_in_form_scales_as_its_family(name):
    assert scaled_otherwise(open_checkpoint(name)) == []


def test_damaged_weights_are_one_message(copied, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(copied, folder)
    next((folder / "transformer").glob("*.safetensors")).write_bytes(b"not weights")
    with pytest.raises(ModelError, match="the transformer of"):
        open_checkpoint(str(folder)).load_transformer(torch.float32)


def test_long_captions_fit_the_text_length():
    caption = (
        "A black and white animated scene unfolds with a curious, round-bodied mouse observing a tethered, cow-like "
        "character in a rural landscape. The cow's distress sparks no reaction from the mouse, who remains "
        "stationary. The scene shifts to the mouse's dynamic run across a bridge, showcasing exaggerated gestures."
    )
    tokens = open_checkpoint("tiny").load_tokenizer()(caption).input_ids
    assert len(tokens) < len(caption) / 2.2
    assert tokens.count(2) == 0, "no unknown pieces in plain English"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's own cache without a network: hub(commit, newest=False, name=...) adds a revision to it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(commit, *, newest=False, name="owner/tiny"):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(open_checkpoint("tiny").root, repository / "snapshots" / commit)
        if newest:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)

    return add


def test_a_revision_of_the_hub_is_opened_by_argument_and_by_name(hub):
    old, new = "0" * 39 + "1", "0" * 39 + "2"
    hub(old)
    hub(new, newest=True)
    assert open_checkpoint("owner/tiny").revision == new
    for opened in (open_checkpoint("owner/tiny", old), open_checkpoint(f"owner/tiny@{old}")):
        assert (opened.name, opened.revision, opened.fingerprint) == ("owner/tiny", old, old)
    assert open_checkpoint("owner/tiny@main", old).revision == new
    with pytest.raises(ModelError, match=f"owner/tiny at revision {'9' * 40} is not here"):
        open_checkpoint("owner/tiny", "9" * 40)


def test_a_published_model_in_other_capitals_is_that_model(hub):
    hub("0" * 40, newest=True, name="THUDM/CogVideoX1.5-5B")
    assert open_checkpoint("thudm/CogVideoX1.5-5b").name == "THUDM/CogVideoX1.5-5B"


def test_other_weights_in_the_same_folder_have_another_fingerprint(tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(open_checkpoint("tiny").root, copied)
    before = open_checkpoint(str(copied)).fingerprint
    assert before == open_checkpoint("tiny").fingerprint
    (weights,) = (copied / "transformer").glob("*.safetensors")
    with weights.open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\1\2\3\4")
    assert open_checkpoint(str(copied)).fingerprint != before


@pytest.mark.parametrize(
    ("name", "meant"), [("5b", "THUDM/CogVideoX-5b"), ("CogVideoX1.5-5b", "THUDM/CogVideoX1.5-5B")]
)
def test_a_model_that_is_nearly_named_is_named(name, meant):
    with pytest.raises(ModelError) as refused:
        open_checkpoint(name)
    assert refused.value.fix == f"--model {meant}"


def test_a_part_of_a_checkpoint_and_a_single_file_are_told_from_a_checkpoint(tmp_path):
    root = open_checkpoint("random-tiny").root
    with pytest.raises(ModelError, match="transformer is a part of a checkpoint") as refused:
        open_checkpoint(str(root / "transformer"))
    assert refused.value.fix == f"--model {root}"
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a single file"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


def test_a_hub_that_may_not_be_asked_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        open_checkpoint("THUDM/CogVideoX-5b")
