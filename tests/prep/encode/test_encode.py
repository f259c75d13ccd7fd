"""The main path, end to end on real clips and the built-in models."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cogcommon.cli.names import tars_in
from cogcommon.cli.settings import resolve
from cogcommon.errors import DataRootError, ModelError, SettingError, ShardError
from cogcommon.files.locks import open_locked
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import BY_NAME, Resolution
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE, Contract
from cogcommon.shards.records import SampleRow, read_record, split_extent
from cogprep.commands.encode import run as run_command
from cogprep.commands.validate import run as validate
from cogprep.plan.folder import commit_contract, read_contract
from cogprep.settings.encode import EncodeSettings, ValidateSettings
from cogprep.vae.encoder import generator_of
from cogprep.video.decode import decode_clip

SIZE = "9x64x96"


def rows_in(folder: Path) -> list[SampleRow]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in read_record(path).rows]


def tensors_in(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors of every sample, by line of the list."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        tar = path.with_suffix(".tar").read_bytes()
        for row in read_record(path).rows:
            if row.status == "ok":
                _, payload = split_extent(tar[row.offset :][: row.size], row)
                found[row.source_line] = safetensors.torch.load(payload)
    return found


def tars(folder: Path) -> dict[str, str]:
    """Name and hash of every tar, in the folder and in val/."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.tar")
    }


def test_clips_become_shards_that_webdataset_reads(run_encode, root, tmp_path):
    report = run_encode()
    assert (report.encoded, report.reused, report.rejected) == (5, 0, 0)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    samples = list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))
    infos = [json.loads(sample["json"]) for sample in samples]
    assert [info["caption"] for info in infos] == [f"wave number {index}" for index in range(5)]
    resolution = Resolution.parse(SIZE)
    for sample in samples:
        tensors = safetensors.torch.load(sample["safetensors"])
        shape = BY_NAME["5b"].latent(resolution)
        assert tensors["latent_mean"].shape == tensors["latent_std"].shape == shape
        assert tensors["text"].shape == (226, 64)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    contract = Contract.from_json((out / CONTRACT_FILE).read_bytes(), where="test")
    empty = (out / EMPTY_CAPTION_FILE).read_bytes()
    assert contract.empty_caption_sha256 == hashlib.sha256(empty).hexdigest()
    assert safetensors.torch.load(empty)["text"].shape == (226, 64)
    assert json.loads((out / "origin.json").read_bytes())["data_root"] == str(root.resolve())


def test_a_second_run_reuses_and_another_folder_gets_the_same_bytes(run_encode, tmp_path):
    run_encode()
    before = tars(tmp_path / "out")
    again = run_encode(workers=2)
    assert (again.encoded, again.reused, again.dropped) == (0, 5, 0)
    assert tars(tmp_path / "out") == before
    run_encode(out=tmp_path / "other", workers=2)
    assert tars(tmp_path / "other") == before


def test_validate_takes_the_settings_file_of_encode(root, tmp_path, capsys):
    file = tmp_path / "ds.toml"
    file.write_text(
        f'data-root = "{root}"\nresolution = ["{SIZE}"]\nmodel = "tiny"\nworkers = 1\nout = "{tmp_path}/out"\n'
        'gpus = "1"\nstrict = true\n'
    )
    look, encode = (resolve(cls, {}, file) for cls in (ValidateSettings, EncodeSettings))
    assert (look.root, look.buckets, look.model) == (encode.root, encode.buckets, encode.model) and encode.strict
    validate(look)
    assert "5 clips for tiny" in " ".join(capsys.readouterr().out.split())


def test_a_model_folder_that_scales_otherwise_than_its_family_is_told(run_encode, root, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(open_checkpoint("tiny").root, model)
    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.9}))
    told = "vae/scaling_factor 0.9 (0.7 in THUDM/CogVideoX-5b)"
    run_encode(model=str(model))
    assert told in capsys.readouterr().err
    assert Contract.from_json((tmp_path / "out" / CONTRACT_FILE).read_bytes(), where="test").scaling_factor == 0.9
    validate(ValidateSettings(data_root=root, out=tmp_path / "out", model=str(model), resolution=[SIZE], workers=1))
    assert told in " ".join(capsys.readouterr().out.split())


def test_latents_and_text_equal_plain_diffusers_bit_for_bit(run_encode, root, tmp_path):
    run_encode(resolution=["9x64x96"])
    checkpoint = open_checkpoint("tiny")
    vae, resolution = checkpoint.load_vae(torch.float32), Resolution.parse(SIZE)
    clip = decode_clip(root / "2.mp4", resolution, EncodeSettings(data_root=root, resolution=[SIZE]).cut, 8, "")
    stored = tensors_in(tmp_path / "out")[3]
    video = [Image.fromarray(frame) for frame in clip.frames_FHWC]
    pixels = VideoProcessor(vae_scale_factor=8).preprocess_video(video, height=64, width=96)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    assert torch.equal(stored["latent_mean"], posterior.mean[0])
    assert torch.equal(stored["latent_std"], posterior.std[0])

    tokenizer, text_encoder = checkpoint.load_tokenizer(), checkpoint.load_text_encoder(torch.float32)
    ids = tokenizer("wave number 2", padding="max_length", max_length=226, truncation=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(stored["text"], text_encoder(ids.input_ids)[0][0])


def test_posterior_sample_is_a_draw_of_its_own_for_every_clip(run_encode, tmp_path):
    run_encode(out=tmp_path / "moments")
    run_encode(posterior="sample")
    moments, drawn = tensors_in(tmp_path / "moments"), tensors_in(tmp_path / "out")
    assert set(drawn[1]) == {"latent_mean", "text"}
    noise = [
        (drawn[line]["latent_mean"] - moments[line]["latent_mean"]) / moments[line]["latent_std"] for line in (1, 2)
    ]
    assert abs(noise[0].std() - 1) < 0.05 and abs(noise[0].mean()) < 0.05
    assert (noise[0] - noise[1]).abs().max() > 1
    run_encode(posterior="sample", seed=43, out=tmp_path / "seed")
    assert not torch.equal(tensors_in(tmp_path / "seed")[1]["latent_mean"], drawn[1]["latent_mean"])


def test_broken_clips_are_named_and_the_rest_is_encoded(run_encode, root, tmp_path, draw_clip, lay_lists, capsys):
    (root / "1.mp4").write_bytes(b"this is no video")
    draw_clip(root / "2.mp4", 9, frames=4)
    damaged = bytearray((root / "3.mp4").read_bytes())
    for place in range(len(damaged) // 2, len(damaged) // 2 + 300, 7):
        damaged[place] ^= 0xFF
    (root / "3.mp4").write_bytes(damaged)  # found only when it is decoded, so it has a place in a shard
    (root / "4.mp4").unlink()
    report = run_encode()
    assert (report.encoded, report.rejected) == (1, 4)
    assert [(rejection.line, rejection.source) for rejection in report.rejections] == [
        (2, "1.mp4"), (3, "2.mp4"), (4, "3.mp4"), (5, "4.mp4"),
    ]  # fmt: skip
    assert report.rejections[1].reason == "too short: 4 frames, 9 are needed"
    assert [row.source for row in rows_in(tmp_path / "out")] == ["0.mp4", "3.mp4"]
    assert [row.reason for row in rows_in(tmp_path / "out")] == ["", report.rejections[2].reason]
    again = run_encode()
    assert (again.encoded, again.reused, again.rejected) == (0, 1, 4)
    assert [r.reason for r in again.rejections] == [r.reason for r in report.rejections]

    strict = EncodeSettings(
        data_root=root, out=tmp_path / "out", model="tiny", resolution=[SIZE], shard_samples=2, workers=1, strict=True
    )
    with pytest.raises(DataRootError, match="4 clips rejected"):
        run_command(strict)
    said = capsys.readouterr().out
    assert "too short" in said
    assert said.index("4 of 5 clips are not in these shards") < said.index("next: cogtrain lora")
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["rejected"] == 4


def test_an_image_that_cannot_be_used_rejects_its_sample(run_encode, root, lay_lists):
    os.mkfifo(root / "pipe.png")  # opening it would wait for ever
    lay_lists(root, ["a", "b"], ["0.mp4", "1.mp4"], ["pipe.png", "gone.png"])
    report = run_encode(model="tiny-i2v", resolution=["17x64x96"])
    assert [rejection.reason for rejection in report.rejections] == [
        "image pipe.png: not a regular file (a pipe, socket or device)", "image gone.png: the file is missing",
    ]  # fmt: skip
    assert not report.usable


def test_nothing_usable_is_an_error(root, tmp_path, capsys):
    for clip in root.glob("*.mp4"):
        clip.write_bytes(b"this is no video")
    settings = EncodeSettings(data_root=root, out=tmp_path / "out", model="tiny", resolution=[SIZE], workers=1)
    with pytest.raises(DataRootError, match="none of the clips"):
        run_command(settings)
    assert not list((tmp_path / "out").glob("*.tar"))
    said = capsys.readouterr().out
    assert "details in" in said and "shards in" not in said


@pytest.mark.parametrize("torchrun", [False, True])
def test_what_another_process_writes_is_not_done(torchrun, encoded_once, settings_of, tmp_path, monkeypatch, capsys):
    """A shell's && and a job's queue must not take it for done; torchrun would stop whoever still has work."""
    shutil.copytree(encoded_once / "out", tmp_path / "out")
    (tmp_path / "out" / "000001.parquet").unlink()
    settings = settings_of(encoded_once, out=tmp_path / "out")
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with open_locked(tmp_path / "out" / ".000001.tar.tmp"):
        if torchrun:
            run_command(settings)
        else:
            with pytest.raises(SystemExit) as ended:
                run_command(settings)
            assert ended.value.code == 75
    said = capsys.readouterr().out
    assert "another process is writing 000001.tar" in said and "not finished yet: 000001.tar" in said
    run_command(settings)
    assert (tmp_path / "out" / "000001.parquet").exists() and "not finished" not in capsys.readouterr().out


def test_a_changed_setting_never_mixes(run_encode, tmp_path):
    run_encode()
    before = tars(tmp_path / "out")
    with pytest.raises(SettingError) as caught:
        run_encode(fit="stretch", id_token="DSNY")
    message = str(caught.value)
    assert "--fit: 'stretch' here, 'crop' there" in message and "--id-token: 'DSNY' here" in message
    assert "clean-cache" in message and "--out" in message
    assert tars(tmp_path / "out") == before


def test_two_sizes_make_two_buckets(run_encode, root, tmp_path, draw_clip):
    draw_clip(root / "1.mp4", 7, height=128, width=72)
    draw_clip(root / "3.mp4", 8, height=128, width=72)
    run_encode(resolution=[SIZE, "9x96x64"])
    buckets = {row.source: row.bucket for row in rows_in(tmp_path / "out")}
    assert [buckets[f"{index}.mp4"] for index in range(5)] == [SIZE, "9x96x64", SIZE, "9x96x64", SIZE]
    by_shard = [{row.bucket for row in read_record(path).rows} for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert by_shard == [{SIZE}, {SIZE}, {"9x96x64"}]


def test_holdout_goes_to_val_by_content_with_all_its_captions(run_encode, root, tmp_path, lay_lists):
    lay_lists(root, [f"wave {i}" for i in range(7)], [f"{i}.mp4" for i in range(5)] + ["0.mp4", "1.mp4"])
    report = run_encode(holdout=2)
    assert report.encoded == 7
    train, val = rows_in(tmp_path / "out"), rows_in(tmp_path / "out" / "val")
    assert len({row.source_sha256 for row in val}) == 2
    assert not {row.source_sha256 for row in val} & {row.source_sha256 for row in train}
    assert len(train) + len(val) == 7
    again = run_encode(holdout=2)
    assert (again.encoded, again.reused, again.dropped) == (0, 7, 0)
    with pytest.raises(SettingError, match="none is left to train on") as caught:
        run_encode(holdout=5)
    assert caught.value.fix == "--holdout 4 or less"


def test_shards_do_not_go_among_the_clips(run_encode, root):
    before = sorted(root.iterdir())
    with pytest.raises(SettingError, match="among your clips"):
        run_encode(out=root)
    assert sorted(root.iterdir()) == before


def test_i2v_stores_the_first_used_frame_clean_and_noised(run_encode, root, tmp_path):
    run_encode(model="tiny-i2v", resolution=["17x64x96"], image_variants=3)
    stored = tensors_in(tmp_path / "out")[1]
    row = rows_in(tmp_path / "out")[0]
    assert stored["image_mean"].shape == (3, 16, 1, 8, 12) and stored["image_clean_std"].shape == (16, 1, 8, 12)
    cut = EncodeSettings(data_root=root, resolution=["17x64x96"]).cut
    clip = decode_clip(root / "0.mp4", Resolution.parse("17x64x96"), cut, 8, row.key)
    vae = open_checkpoint("tiny-i2v").load_vae(torch.float32)
    pixels = torch.from_numpy(clip.frames_FHWC[:1]).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
    generator = generator_of(42, row.key, "image noise")
    with torch.no_grad():
        assert torch.equal(stored["image_clean_mean"], vae.encode(pixels).latent_dist.mean[0])
        for variant in range(3):
            sigma = torch.exp(torch.randn((), generator=generator) * 0.5 - 3.0)
            noised = pixels + sigma * torch.randn(pixels.shape, generator=generator)
            assert torch.equal(stored["image_mean"][variant], vae.encode(noised).latent_dist.mean[0])


def test_i2v_images_go_through_their_clips_crop(run_encode, root, tmp_path, lay_lists):
    cut = EncodeSettings(data_root=root, resolution=["17x64x96"]).cut
    for index in range(5):
        clip = decode_clip(root / f"{index}.mp4", Resolution(17, 128, 128), cut, 8, "")
        profile = b"junk" if index == 1 else None  # cannot be applied
        Image.fromarray(clip.frames_FHWC[5]).save(root / f"{index}.png", icc_profile=profile)
    names = [str(index) for index in range(5)]
    lay_lists(root, names, [f"{name}.mp4" for name in names], [f"{name}.png" for name in names])
    assert run_encode(model="tiny-i2v", resolution=["17x64x96"], image_variants=1).profiles_unused == 1
    row = rows_in(tmp_path / "out")[0]
    assert row.image == "0.png" and row.image_sha256 == hashlib.sha256((root / "0.png").read_bytes()).digest()
    still = np.asarray(Image.open(root / "0.png"))
    assert still.shape == (128, 128, 3)
    vae = open_checkpoint("tiny-i2v").load_vae(torch.float32)
    clean = tensors_in(tmp_path / "out")[1]["image_clean_mean"]
    # 128x128 to 64x96: scaled to 96x96, 16 rows cut above and below.
    scaled = np.asarray(Image.fromarray(still).resize((96, 96), Image.Resampling.BICUBIC))[16:80]
    pixels = torch.from_numpy(scaled.copy()).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
    with torch.no_grad():
        assert torch.equal(clean, vae.encode(pixels).latent_dist.mean[0])
    (root / "0.png").write_bytes((root / "1.png").read_bytes())
    again = run_encode(model="tiny-i2v", resolution=["17x64x96"], image_variants=1)
    assert (again.encoded, again.reused, again.dropped) == (1, 4, 1)


@pytest.mark.parametrize("part, file", [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_a_checkpoint_that_lacks_weights_is_refused_before_a_clip_is_read(part, file, run_encode, tmp_path):
    shutil.copytree(open_checkpoint("random-tiny").root, tmp_path / "model")
    path = tmp_path / "model" / part / f"{file}.safetensors"
    weights = safetensors.torch.load_file(path)
    first = next(iter(weights))
    safetensors.torch.save_file({name: weights[name] for name in weights if name != first}, path)
    with pytest.raises(ModelError, match=f"the {part} of .* lacks 1 weight of its .* the first {re.escape(first)}"):
        run_encode(model=str(tmp_path / "model"))
    assert not (tmp_path / "out").exists()


def test_names_with_brackets_are_shown_as_they_are(root, tmp_path, lay_lists, capsys):
    (root / "[raw]" / "[").mkdir(parents=True)
    (root / "0.mp4").rename(root / "[raw]" / "0.mp4")
    (root / "[raw]" / "[/x].mp4").write_bytes(b"no clip")
    lay_lists(root, ["a wave", "none"], ["[raw]/0.mp4", "[raw]/[/x].mp4"])
    odd = tmp_path / "set [v2] & more"
    odd.mkdir()
    root.rename(odd / "ds")
    chosen = {"data_root": odd / "ds", "out": odd / "out", "model": "tiny", "resolution": [SIZE], "workers": 1}
    run_command(EncodeSettings(**chosen))
    said = capsys.readouterr().out
    assert "[raw]/[/x].mp4" in said and f"shards in {odd / 'out'}, details in" in said
    assert f"next: cogtrain lora --shards {tars_in(odd / 'out')}" in said
    with pytest.raises(DataRootError):
        validate(ValidateSettings(**chosen))
    assert "[raw]/[/x].mp4" in capsys.readouterr().out


def test_bad_lists_stop_everything(run_encode, root, tmp_path):
    (root / "prompts.txt").write_text("one\n\ntwo\n")
    with pytest.raises(DataRootError, match="2 faults"):
        run_encode()
    assert not (tmp_path / "out").exists()


def test_an_empty_caption_that_no_contract_speaks_for_is_not_taken(encoded_once, tmp_path, monkeypatch):
    """As a run of another model leaves one, or a person; and as another GPU's is, whose writer was killed."""
    monkeypatch.setattr("cogprep.plan.folder.ABOUT_TO_WRITE_S", 0.1)
    contract, path = read_contract(encoded_once / "out"), tmp_path / "empty_caption.safetensors"
    ours = (encoded_once / "out" / path.name).read_bytes()
    path.write_bytes(b"another model's")
    with pytest.raises(ShardError, match="is not the one that the contract names") as caught:
        commit_contract(tmp_path, contract, ours)
    assert path.read_bytes() == b"another model's" and str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(ShardError, match=r"no empty_caption\.safetensors"):
        commit_contract(tmp_path, contract, b"of another GPU")
    assert not path.exists()
    assert commit_contract(tmp_path, contract, ours) == contract and path.read_bytes() == ours
