import pytest

from cogcommon.errors import CogError, ModelError, SettingError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, FAMILIES, Resolution, family_of

# The published transformer configs, as far as they tell the families apart.
V1 = {"out_channels": 16, "max_text_seq_length": 226}
V15 = {"out_channels": 16, "max_text_seq_length": 224, "use_rotary_positional_embeddings": True, "patch_size_t": 2}
PUBLISHED = {
    "2b": V1 | {"in_channels": 16, "use_rotary_positional_embeddings": False},
    "5b": V1 | {"in_channels": 16, "use_rotary_positional_embeddings": True},
    "5b-i2v": V1
    | {"in_channels": 32, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "1.5-5b": V15 | {"in_channels": 16},
    "1.5-5b-i2v": V15 | {"in_channels": 32, "ofs_embed_dim": 512},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_recognised(name):
    assert family_of(PUBLISHED[name], where="config.json").name == name


def test_a_config_that_contradicts_its_family_is_refused_with_both_values():
    with pytest.raises(ModelError, match="max_text_seq_length 100; the family has 226"):
        family_of(PUBLISHED["5b"] | {"max_text_seq_length": 100}, where="x")


def test_a_foreign_structure_is_refused():
    with pytest.raises(ModelError, match="not a CogVideoX"):
        family_of({"in_channels": 32, "out_channels": 16, "use_rotary_positional_embeddings": False}, where="x")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_built_in_form_has_the_structure_of_its_family(family):
    checkpoint = open_checkpoint(family.builtin)
    assert checkpoint.family is family
    assert checkpoint.vae_config["scaling_factor"] == family.scaling_factor
    assert checkpoint.vae_config["invert_scale_latents"] == family.invert_image_scale
    assert checkpoint.scheduler_config["snr_shift_scale"] == family.snr_shift
    assert ("DDIM" in checkpoint.scheduler_config["_class_name"]) == family.ddim
    assert checkpoint.native == Resolution(17, 64, 96)


def test_shapes_of_a_resolution():
    resolution = Resolution.parse("49x480x720")
    assert BY_NAME["5b"].latent(resolution) == (16, 13, 60, 90)
    assert str(resolution) == "49x480x720"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("48x480x720", "41x480x720 or 49x480x720"),
        ("49x100x100", "height 100"),
        ("49x480x700", "49x480x704"),
        ("0x480x720", "9x480x720"),
        ("480x720", "frames x height x width"),
        ("49x0x720", "height 0"),
        ("49 480 720", "frames x height x width"),
        ("480x720x49", "--resolution 49x480x720"),
    ],
)
def test_an_impossible_resolution_names_the_next_possible(text, told):
    with pytest.raises(SettingError) as caught:
        Resolution.parse(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("model", "size", "told"),
    [
        ("tiny-i2v", "17x64x112", "--resolution 17x64x96"),
        ("tiny-i2v", "9x64x96", "--resolution 17x64x96"),
        ("tiny-i2v", "1x64x96", "text-to-video models take pictures"),
        ("tiny-1.5-i2v", "1x64x96", "--resolution 9x64x96"),
        ("tiny", "57x64x96", "--resolution 49x64x96"),
        ("tiny-1.5", "17x784x96", "--resolution 17x768x96"),
        ("tiny-1.5", "169x64x96", "--resolution 161x64x96"),
    ],
)
def test_a_size_the_family_cannot_take_names_one_it_can(model, size, told):
    with pytest.raises(SettingError) as caught:
        open_checkpoint(model).check_resolution(Resolution.parse(size))
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["2b", "5b", "1.5-5b"])
def test_a_picture_is_one_latent_frame_and_whole_tokens(name):
    family, picture = BY_NAME[name], Resolution.parse("1x480x720")
    open_checkpoint(family.builtin).check_resolution(picture)
    patch = family.patch_t or 1
    assert family.latent(picture) == (16, 1, 60, 90) and family.padded_latent(picture) == (16, patch, 60, 90)
    assert family.tokens(picture) == 30 * 45 + family.text_tokens


@pytest.mark.parametrize("model", ["tiny", "tiny-2b", "tiny-1.5", "tiny-1.5-i2v"])
def test_all_but_one_form_take_the_published_size(model):
    open_checkpoint(model).check_resolution(Resolution.parse("49x480x720"))


def test_every_family_has_its_own_name_and_form():
    assert len(BY_NAME) == len({family.builtin for family in FAMILIES}) == len(FAMILIES) == 5
    assert [family.in_channels for family in FAMILIES] == [16, 16, 32, 16, 32]


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./nowhere"])
def test_a_model_that_is_not_there_is_one_clear_message(name, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CogError) as caught:
        open_checkpoint(name)
    assert caught.value.fix and "tiny" in caught.value.fix
    assert name in str(caught.value)
