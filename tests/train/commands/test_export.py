"""Export: the libraries that load the weights get the model that was trained."""

import dataclasses
import json
import shutil
import tomllib
from typing import get_args

import pytest
import safetensors.torch
import torch
import yaml
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from forked import ForkedRanks
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file

from cogcommon.cli.names import plain
from cogcommon.errors import CogError, RunError
from cogcommon.files.ownership import Made, take_output
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import Resolution
from cogtrain.commands import export
from cogtrain.model import lora
from cogtrain.model.compare import difference, output_on_noise
from cogtrain.model.sft import load
from cogtrain.report.card import Kind, card, write_card
from cogtrain.report.drawn import Drawn
from cogtrain.runs.folder import read_run
from cogtrain.settings.results import ExportSettings
from cogtrain.settings.training import LoraSettings, SftSettings
from cogtrain.validation.tuned import find_tuned


def fresh():
    return open_checkpoint("tiny").load_transformer(torch.float32)


@pytest.fixture
def lora_run(tmp_path, make_shards, train_here):
    """Two steps with a checkpoint after each; alpha/rank is 0.25, and the rate high enough to matter."""
    make_shards(tmp_path / "out", samples=4)
    return train_here(
        LoraSettings(
            shards=[str(tmp_path / "out")], out=tmp_path / "run", steps=2, save_every=1, rank=4, alpha=1.0, lr=0.3
        )
    )


def through_pipeline(folder):
    pipeline = CogVideoXPipeline.from_pretrained(open_checkpoint("tiny").root)
    pipeline.load_lora_weights(folder)
    return pipeline.transformer


LOADERS = {
    "diffusers": through_pipeline,
    "peft": lambda folder: PeftModel.from_pretrained(fresh(), folder).get_base_model(),
    "merged": lambda folder: CogVideoXTransformer3DModel.from_pretrained(folder / "transformer"),
    "comfyui": lambda folder: merged_as_comfyui_does(folder / "run-2-comfyui.safetensors"),
}


def merged_as_comfyui_does(file):
    """By the rule of ComfyUI's loader for the four layers of each block that a run trains without --target-modules."""
    transformer, tensors = fresh(), load_file(file)
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "attn_out": "to_out.0"}
    with torch.no_grad():
        for number, block in enumerate(transformer.transformer_blocks):
            for theirs, ours in names.items():
                a, b = (tensors.pop(f"diffusion_model.blocks.{number}.{theirs}.lora_{side}.weight") for side in "AB")
                block.attn1.get_submodule(ours).weight += b @ a
    assert not tensors
    return transformer


def test_every_form_of_a_lora_answers_as_the_run(lora_run, capsys):
    expected = output_on_noise(through_pipeline(lora_run))
    assert difference(output_on_noise(fresh()), expected) > 1e-3
    for form, loaded in LOADERS.items():
        export.run(ExportSettings(run=lora_run, to=form, json=True))
        said = json.loads(capsys.readouterr().out)
        folder = lora_run / "exported" / form
        assert said["difference"] < 1e-5
        assert said["step"] == 2
        assert difference(expected, output_on_noise(loaded(folder))) < 1e-5, form
        card = (folder / "README.md").read_text()
        assert 'base_model: "tiny"' in card
        assert "| steps | 2 of 2 |" in card
        assert "| training loss, smoothed | " in card
    own = lora_run / "exported/diffusers/run-2.safetensors"
    assert own.read_bytes() == (own.parent / lora.FILE).read_bytes()
    assert Made.read(own.parent).owns(own.name)
    assert "run-2-comfyui.safetensors` into `models/loras`" in (lora_run / "exported/comfyui/README.md").read_text()
    config = json.loads((lora_run / "exported/peft/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4


def test_a_peft_folder_tells_our_commands_which_folder_its_base_model_is(tmp_path, make_shards, train_here):
    """Its config, which is published, has that folder's name alone."""
    model = tmp_path / "my-model"
    shutil.copytree(open_checkpoint("tiny").root, model)
    make_shards(tmp_path / "out", str(model), samples=2)
    run = train_here(LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / "run", steps=1, rank=4))
    export.run(ExportSettings(run=run, to="peft", out=tmp_path / "peft"))
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == "my-model"
    tuned = find_tuned(None, [str(tmp_path / "peft")], None, None)
    assert tuned.checkpoint.root == model and tuned.checkpoint.family.name == "5b"


def test_a_peft_file_that_is_a_little_off_is_refused_in_half_precision_too(lora_run, monkeypatch, capsys):
    export.run(ExportSettings(run=lora_run, to="peft", precision="bf16", json=True))
    assert json.loads(capsys.readouterr().out)["difference"] < 0.1
    written = safetensors.torch.save

    def one_percent_off(tensors, metadata):
        name = next(name for name in tensors if "lora_B" in name)
        return written(tensors | {name: tensors[name] * 1.01}, metadata)

    monkeypatch.setattr(safetensors.torch, "save", one_percent_off)
    with pytest.raises(RunError, match="1 weights act otherwise"):
        export.run(ExportSettings(run=lora_run, to="peft", precision="bf16"))


def test_generate_draws_at_the_size_of_the_run(tmp_path, make_shards, train_here):
    size = Resolution(9, 64, 64)
    make_shards(tmp_path / "out", samples=1, resolutions=(size,))
    run = train_here(LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / "run", steps=1, rank=4))
    assert find_tuned(run, [], None, None).sizes == [size]
    assert find_tuned(None, [str(run / lora.FILE)], None, None).sizes == [open_checkpoint("tiny").native]


def test_an_earlier_checkpoint_gives_its_own_weights(lora_run, capsys):
    first, second = lora_run / "checkpoint-1", lora_run / "checkpoint-2"
    for checkpoint in (first, second):
        export.run(ExportSettings(run=checkpoint))
    assert "step 1" in capsys.readouterr().out
    last = load_file(lora_run / lora.FILE)
    of_first, of_second = (load_file(c / "exported/diffusers" / lora.FILE) for c in (first, second))
    assert all(torch.equal(last[name], of_second[name]) for name in last)
    assert any(not torch.equal(last[name], of_first[name]) for name in last)
    assert "| steps | 1 of 2 |" in (first / "exported/diffusers/README.md").read_text()


def test_the_run_has_a_card_whose_code_runs(lora_run, monkeypatch):
    """In its folder, and it draws a video."""
    card = (lora_run / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "num_frames=17, height=64, width=96" in code
    code = code.replace("num_inference_steps=50", "num_inference_steps=1").replace("num_frames=17", "num_frames=9")
    monkeypatch.chdir(lora_run)
    drawn = {}  # diffusers needs a library for that which we do not
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: drawn.update({path: frames}))
    exec(code, space := {})
    assert difference(output_on_noise(through_pipeline(lora_run)), output_on_noise(space["pipe"].transformer)) == 0
    assert len(drawn["video.mp4"]) == 9


def test_a_card_tells_others_names_and_no_path_of_this_machine(recorded_run):
    """Whatever setting names a file or folder, one that is yet to come, too."""
    home = "/home/jane"
    paths = {field.name: f"{home}/{field.name}.x" for field in dataclasses.fields(LoraSettings) if "Path" in field.type}
    lists = {"shards": [f"{home}/fox/00.tar", f"{home}/fox/01.tar", "s3://jane/more/*.tar", "hf://datasets/a/known"]}
    lists |= {
        "repeat": [f"{home}/fox/=8", "1x480x720=2"],
        "validate_image": [f"{home}/first.png"],
        "mirror": "s3://jane",
    }
    lists |= {"validate_prompt": ["/ a fox"]}
    run = read_run(recorded_run)
    for model, family, base in (
        (f"{home}/models/CogVideoX-5b", "5b", "THUDM/CogVideoX-5b"),
        (f"{home}/.cache/hub/models--a--mine/snapshots/0", "5b", "a/mine"),
        (f"{home}/my-model", "2b", "my-model"),
    ):
        facts = dataclasses.replace(run.facts, model=model, family=family)
        told = dataclasses.replace(run, facts=facts, settings=paths | lists | {"model": model})
        for kind in get_args(Kind):
            text = card(told, kind, 40, recorded_run, {})
            assert "jane" not in text and str(recorded_run) not in text
            settings = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
            assert settings["shards"] == ["fox", "more", "hf://datasets/a/known"] and settings["model"] == base
            assert settings["repeat"] == ["fox=8", "1x480x720=2"] and settings["validate_image"] == ["first.png"]
            assert settings["init_lora"] == "init_lora.x" and settings["validate_prompt"] == ["/ a fox"]
            assert yaml.safe_load(text.split("---")[1])["base_model"] == base and f"# LoRA of {base}" in text
            assert kind == "comfyui" or f'.from_pretrained("{base}"' in text


def test_the_card_has_the_trigger_word_and_samples_which_go_with_an_export(tmp_path, recorded_run):
    run = read_run(recorded_run)
    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, id_token="sks"))
    shutil.copytree(recorded_run / "validation/step-000020", recorded_run / "validation/step-000000")  # the base's
    out = tmp_path / "out"
    take_output(out, export._EXPORT, "--out")
    text = write_card(out, run, "lora", 20).read_text()
    assert 'instance_prompt: "sks"' in text
    assert "Begin each prompt with the word it was trained with: `sks`." in text
    assert '<video controls preload="metadata" width="480" src="samples/0.mp4"></video>\n\n> a &lt;cat&gt;' in text
    assert (out / "samples/0.mp4").read_bytes() == (recorded_run / "validation/step-000020/0.mp4").read_bytes()
    assert Made.read(out).owns("samples/0.mp4")
    assert "samples/" not in write_card(out, run, "lora", 40).read_text()  # of another step
    (out / "README.md").write_text("mine")
    assert write_card(out, run, "lora", 40) is None


def test_a_card_reads_the_same_as_yaml_and_toml_whatever_letters_it_holds(recorded_run):
    prompt = 'a "fox" 🦊\x7f\x85\u2028 runs'
    run = dataclasses.replace(read_run(recorded_run), settings={"validate_prompt": [prompt], "lr": 1e-8})
    text = plain(card(run, "lora", 40, recorded_run, {"samples/0.mp4": Drawn(prompt, recorded_run / "0.mp4")}))
    assert ModelCard(text).data.widget[0]["text"] == prompt
    assert tomllib.loads(text.split("```toml\n")[1].split("```")[0]) == run.settings


def test_full_fine_tuning(tmp_path, make_shards, train_here):
    make_shards(tmp_path / "out", samples=2)
    settings = {"shards": [str(tmp_path / "out")], "out": tmp_path / "run", "save_every": 1}
    run = train_here(SftSettings(**settings, steps=2, lr=1e-2))
    for source in (run, run / "checkpoint-2"):
        export.run(ExportSettings(run=source, precision="bf16", out=tmp_path / "written"))
        written = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "written/transformer")
        trained = dict(load(run / "transformer", open_checkpoint("tiny"), torch.float32).named_parameters())
        assert all(torch.equal(p, trained[name].bfloat16().float()) for name, p in written.float().named_parameters())
    for form in ("peft", "comfyui"):
        with pytest.raises(CogError, match="no adapter"):
            export.run(ExportSettings(run=run, to=form))


def test_what_cannot_be_exported_is_said_in_words(tmp_path, lora_run):
    with pytest.raises(CogError, match="trained for 5b, and tiny-2b is 2b"):
        export.run(ExportSettings(run=lora_run / "checkpoint-1", model="tiny-2b"))
    with pytest.raises(RunError, match="other weights than its run trains in random-tiny"):
        export.run(ExportSettings(run=lora_run / "checkpoint-1", model="random-tiny"))
    with pytest.raises(RunError, match="no such run or checkpoint"):
        export.run(ExportSettings(run=lora_run / "checkpoint-9"))
    (lora_run / lora.FILE).unlink()
    with pytest.raises(RunError, match="has not finished") as caught:
        export.run(ExportSettings(run=lora_run))
    assert caught.value.fix == f"--run {lora_run / 'checkpoint-2'}"
    (lora_run / "checkpoint-2/weights.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="cannot be read"):
        export.run(ExportSettings(run=lora_run / "checkpoint-2"))
    with pytest.raises(CogError, match="no run was named"):
        export.run(ExportSettings())
    with pytest.raises(RunError, match="not a run folder"):
        export.run(ExportSettings(run=tmp_path))


def test_from_a_zero3_checkpoint(tmp_path, make_shards):
    """The parts of two processes, put together by DeepSpeed's own means, are what the run exported."""
    make_shards(tmp_path / "out", samples=2)
    words = ["--shards", "out", "--out", "run", "--steps", 1, "--rank", 4, "--lr", 0.1, "--strategy", "zero3"]
    ended = ForkedRanks(2, ["cogtrain", "lora", *words], tmp_path).end()
    assert all(code == 0 for code, *_ in ended), ended
    run = tmp_path / "run"
    export.run(ExportSettings(run=run / "checkpoint-1"))
    mine, theirs = load_file(run / lora.FILE), load_file(run / "checkpoint-1/exported/diffusers" / lora.FILE)
    assert any(tensor.abs().max() > 0 for name, tensor in mine.items() if "lora_B" in name)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
