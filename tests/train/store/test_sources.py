import dataclasses
import random
import shutil

import pytest

from cogcommon.errors import ModelError, ShardError, StoreError
from cogcommon.model.checkpoint import open_checkpoint
from cogcommon.model.families import Resolution
from cogcommon.shards.contract import EMPTY_CAPTION_FILE
from cogcommon.shards.records import read_record, write_record
from cogprep.commands.index import index
from cogprep.store.rewrite import drop_samples
from cogtrain.data.batches import read_sample
from cogtrain.data.compatibility import check_model, check_shards_alike
from cogtrain.data.shards import open_shards

NATIVE = Resolution(17, 64, 96)


def read_all(words):
    shards = open_shards([str(word) for word in words])
    return [read_sample(shards, index) for index in range(len(shards))]


def test_all_ways_to_name_shards_mean_the_same(tmp_path, make_shards, monkeypatch):
    tars = make_shards(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    expected = open_shards([str(tar) for tar in tars])
    ways = [
        ["out/*.tar"],
        ["out/{000000..000002}.tar"],
        ["out/000002.tar", "out/000000.tar", "out/000001.tar"],
        ["out"],
        [f"file://{tmp_path}/out/*.tar"],
        ["out/*.tar", "out/000001.tar"],  # named twice, read once
    ]
    for words in ways:
        shards = open_shards(words)
        assert shards.table["key"].to_pylist() == expected.table["key"].to_pylist(), words
        assert shards.fingerprint == expected.fingerprint
    assert open_shards(["out/*.tar"]).shards[0].shown.startswith("out/")


def test_a_folder_that_was_moved_has_the_same_fingerprint(tmp_path, make_shards):
    make_shards(tmp_path / "a")
    before = open_shards([str(tmp_path / "a")]).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert open_shards([str(tmp_path / "b")]).fingerprint == before


def test_shards_behind_a_url(tmp_path, make_shards):
    import fsspec

    make_shards(tmp_path / "out", samples=4)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), "/bucket/", recursive=True)
    local, remote = open_shards([str(tmp_path / "out")]), open_shards(["memory://bucket/out/*.tar"])
    assert remote.fingerprint == local.fingerprint
    assert remote.shards[0].shown.startswith("memory://")
    assert read_sample(remote, 3).caption == read_sample(local, 3).caption
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--shards is not given"),
        (["nothing/*.tar"], "no shard matches nothing/"),
        (["out/000009.tar"], "no such shard"),
        (["otu/"], r"there is no otu/[^?]*did you mean out\? give the tars that"),
        (["out/contract.json"], "is not a shard"),
        (["s4://x/*.tar"], "cannot be looked up"),
    ],
)
def test_words_that_stand_for_nothing(tmp_path, make_shards, monkeypatch, words, says):
    make_shards(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ShardError, StoreError), match=says):
        open_shards(words)


@pytest.mark.parametrize("folder", ["out", "out/val"])
def test_a_tar_without_a_record_names_each_command_that_may_help(tmp_path, make_shards, monkeypatch, folder):
    make_shards(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder / "000001.parquet").unlink()
    with pytest.raises(ShardError, match="without its record") as caught:
        open_shards([folder])
    for command in ("`cogprep encode`", "`cogprep index out`", "`cogprep clean-cache --out out`"):
        assert command in caught.value.fix
    assert caught.value.where == f"{folder}/000001.tar"


def test_a_tar_that_is_no_shard_is_not_called_unfinished(tmp_path, make_shards):
    make_shards(tmp_path)
    (tmp_path / "backup.tar").write_bytes((tmp_path / "000000.tar").read_bytes())
    with pytest.raises(ShardError, match="a tar without a record beside it") as caught:
        open_shards([f"{tmp_path}/*.tar"])
    assert caught.value.where.endswith("backup.tar") and "its record as backup.parquet" in caught.value.fix


def test_a_damaged_record_is_named(tmp_path, make_shards):
    make_shards(tmp_path)
    record = tmp_path / "000001.parquet"
    record.write_bytes(record.read_bytes()[:-40])
    with pytest.raises(ShardError, match="record is damaged") as caught:
        open_shards([str(tmp_path)])
    assert caught.value.where.endswith("000001.parquet")


def test_every_cut_and_every_flip_of_a_tar_is_named(tmp_path, make_shards):
    """Cut at a header, webdataset would end in silence; a flipped byte it would never notice."""
    tar, other = make_shards(tmp_path / "out", samples=4)
    whole = tar.read_bytes()
    words = [tar, other]
    assert len(read_all(words)) == 4
    cuts = range(0, len(whole), 512)
    for cut in cuts:
        tar.write_bytes(whole[:cut])
        with pytest.raises(ShardError) as caught:
            open_shards([str(word) for word in words])
        assert tar.name in caught.value.where
    tar.write_bytes(whole)
    shards = open_shards([str(word) for word in words])
    mine = [index for index in range(4) if shards.shards[shards.extent(index).shard].path == str(tar)]
    rng = random.Random(0)
    places = [rng.randrange(len(whole)) for _ in range(1000)] + [0, 1023, len(whole) - 1]
    for place in places:
        with tar.open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([whole[place] ^ 1 << rng.randrange(8)]))
        with pytest.raises(ShardError) as caught:
            open_shards([str(tar)])
            for index in mine:
                read_sample(shards, index)
        assert tar.name in caught.value.where, place
        with tar.open("r+b") as stream:
            stream.seek(place)
            stream.write(whole[place : place + 1])
    assert len(read_all(words)) == 4


def test_a_record_that_leaves_bytes_out_is_refused(tmp_path, make_shards):
    (tar,) = make_shards(tmp_path, samples=2)
    record = read_record(tar.with_suffix(".parquet"))
    write_record(dataclasses.replace(record, rows=record.rows[1:]), tar.with_suffix(".parquet"))
    with pytest.raises(ShardError, match="belong to no sample"):
        open_shards([str(tar)])


def test_shards_of_two_contracts_do_not_mix(tmp_path, make_shards):
    make_shards(tmp_path / "a")
    make_shards(tmp_path / "b", posterior="sample", seed=1)
    with pytest.raises(ShardError, match=r"posterior: '(moments|sample)' here"):
        open_shards([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_copied_folder_is_not_trained_twice(tmp_path, make_shards):
    make_shards(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ShardError, match="6 samples are in more than one"):
        open_shards([str(tmp_path / "a"), str(tmp_path / "b")])


def test_rejected_samples_only(tmp_path, make_shards):
    (tar,) = make_shards(tmp_path, samples=2)
    record = read_record(tar.with_suffix(".parquet"))
    rows = [dataclasses.replace(row, status="rejected", reason="too short", offset=-1) for row in record.rows]
    tar.write_bytes(b"\0" * 10240)
    header = dataclasses.replace(record.header, tar_size=10240)
    write_record(dataclasses.replace(record, header=header, rows=rows), tar.with_suffix(".parquet"))
    with pytest.raises(ShardError, match="no usable sample") as caught:
        open_shards([str(tar)])
    assert "cogprep inspect" in caught.value.fix


def test_a_shard_that_is_rewritten_while_it_is_trained_is_not_called_damaged(tmp_path, make_shards):
    """A line goes, and encode takes its sample out of a shard that a run has open."""
    tar, _ = make_shards(tmp_path, samples=4)
    record = tar.with_suffix(".parquet")
    shards, first = open_shards([str(tmp_path)]), read_record(record).rows[0].key
    at = shards.table["key"].to_pylist().index(read_record(record).rows[1].key)
    drop_samples(tmp_path, 0, lambda row: row.key != first)
    with pytest.raises(StoreError, match="has been replaced since the run was opened"):
        read_sample(shards, at)
    record.unlink()  # between the two renames
    with pytest.raises(StoreError, match="has been replaced since the run was opened"):
        read_sample(shards, at)


def test_held_out_samples_are_left_out_by_key_and_by_clip(tmp_path, make_shards):
    make_shards(tmp_path / "out")
    make_shards(tmp_path / "val", samples=2)  # the same first two clips
    train, val = open_shards([str(tmp_path / "out")]), open_shards([str(tmp_path / "val")])
    left = train.without(val)
    assert len(left) == 4 and not set(left.table["key"].to_pylist()) & set(val.table["key"].to_pylist())
    # The same clip with another caption has another key; it is still seen.
    (tar,) = make_shards(tmp_path / "other", samples=1, captions=("something else",))
    record = read_record(tar.with_suffix(".parquet"))
    rows = [dataclasses.replace(record.rows[0], source_sha256=_clip(tmp_path / "out", 1))]
    write_record(dataclasses.replace(record, rows=rows), tar.with_suffix(".parquet"))
    assert len(train.without(open_shards([str(tar)]))) == 5
    with pytest.raises(ShardError, match="all 6 samples"):
        train.without(train)


def test_records_that_were_rebuilt_are_held_out_by_key_alone(tmp_path, make_shards):
    """They do not say of which clip a sample is; that is no clip that all of them share."""
    opened = []
    for name, samples in (("out", 6), ("val", 2)):
        for tar in make_shards(tmp_path / name, samples=samples):
            tar.with_suffix(".parquet").unlink()
        index(tmp_path / name)
        opened.append(open_shards([str(tmp_path / name)]))
    train, val = opened
    assert val.of_no_clip == 2 and len(train.without(val)) == 4


def _clip(folder, line):
    rows = [row for path in folder.glob("*.parquet") for row in read_record(path).rows]
    return next(row.source_sha256 for row in rows if row.source_line == line)


def test_the_wrong_model_is_refused_with_both_values(tmp_path, make_shards):
    make_shards(tmp_path)
    contract = open_shards([str(tmp_path)]).contract
    check_model(contract, open_checkpoint("tiny"), "out")
    for form, says in (("tiny-2b", "family 5b, the model has 2b"), ("tiny-i2v", "family 5b, the model has 5b-i2v")):
        with pytest.raises(ModelError, match=says) as caught:
            check_model(contract, open_checkpoint(form), "out")
        assert f"--model {form}" in caught.value.where and "--model tiny" in caught.value.fix
    mine = open_checkpoint("tiny")
    other = dataclasses.replace(contract.vae, weights_sha256="0" * 64)
    for change, says in (
        ({"task": "i2v"}, "task i2v, the model has t2v"),
        ({"text_tokens": 224}, "text length 224, the model has 226"),
        ({"text_dim": 4096}, "text width 4096, the model has 64"),
        ({"scaling_factor": 1.15}, "scaling factor 1.15, the model has 0.7"),
        ({"vae": other}, "another VAE: its weights sha256 is 000000000000"),
    ):
        with pytest.raises(ModelError, match=says):
            check_model(dataclasses.replace(contract, **change), mine, "out")


def test_validation_shards_of_another_model_are_refused(tmp_path, make_shards):
    make_shards(tmp_path / "a")
    contract = open_shards([str(tmp_path / "a")]).contract
    check_shards_alike(contract, dataclasses.replace(contract, settings={"frames": "even"}), "val")
    with pytest.raises(ShardError, match="text_tokens: 226 in --shards, 224 here"):
        check_shards_alike(contract, dataclasses.replace(contract, text_tokens=224), "val")


def test_the_empty_caption_must_belong_to_the_shards(tmp_path, make_shards):
    make_shards(tmp_path)
    shards = open_shards([str(tmp_path)])
    assert shards.empty_caption()
    file = tmp_path / EMPTY_CAPTION_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match="does not belong"):
        shards.empty_caption()
    file.unlink()
    with pytest.raises(ShardError, match="is missing"):
        shards.empty_caption()
