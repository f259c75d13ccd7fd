"""`cogprep init`: lists that pair, from whatever lies in a folder; none that is there is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from cogcommon.errors import DataRootError
from cogprep.caption.blank_lines import CaptionList
from cogprep.commands.init import Told, init, run
from cogprep.commands.split import split
from cogprep.commands.validate import validate
from cogprep.dataset.lists import read_lists
from cogprep.settings.encode import ValidateSettings
from cogprep.settings.lists import InitSettings, SplitSettings


def lay(root: Path, *clips: str, **texts: str | bytes) -> Path:
    """A folder of clips, which `init` does not open, and texts: ``a_txt`` is a.txt."""
    for name in clips:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"clip")
    for name, text in texts.items():
        path = root / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def pairs(root: Path) -> list[tuple[str, str]]:
    """Clips and captions, line by line."""
    lines = [(root / name).read_text("utf-8").split("\n") for name in ("videos.txt", "prompts.txt")]
    assert [line.pop() for line in lines] == ["", ""]
    return list(zip(*lines, strict=True))


def said(told: Told) -> str:
    return "\n".join(told.notes)


def test_a_folder_that_is_not_there_is_told_by_the_argument_and_what_is_like_it(tmp_path):
    lay(tmp_path, "holiday/a.mp4", "other/b.mp4")
    with pytest.raises(DataRootError, match="no such data root") as caught:
        init(tmp_path / "holidya")
    assert caught.value.where == f"DS {tmp_path / 'holidya'}"
    assert caught.value.fix == f"did you mean {tmp_path / 'holiday'}? DS takes the folder that holds your clips"
    with pytest.raises(DataRootError) as caught:
        init(tmp_path / "quite" / "elsewhere")
    assert caught.value.fix == "DS takes the folder that holds your clips"


def test_an_address_is_refused_with_what_makes_lists_for_a_bucket():
    split_to = SplitSettings(film=Path("s3://studio/films"), out=Path("ds"))
    told = {"init": "DS s3://studio/clips", "caption": "DS s3://studio/clips", "split": "FILM s3://studio/films"}
    for command, do in {
        "init": lambda: init(Path("s3://studio/clips")),
        "caption": lambda: CaptionList(Path("s3://studio/clips"), "prompts.txt", "videos.txt"),
        "split": lambda: split(split_to),
    }.items():
        with pytest.raises(DataRootError, match=f"cogprep {command} works on folders of this machine") as caught:
            do()
        assert caught.value.where == told[command] and "s3://bucket/a.mp4" in caught.value.fix


def test_clips_of_all_folders_in_order_with_the_texts_beside_them(tmp_path):
    lay(
        tmp_path,
        "b/2.MOV",
        "b/1.webm",
        "a.mp4",
        "notes.pdf",
        b__1_txt="\ufeffa cat\r\n\r\nruns ",
        b__2_txt=b"\xff\xfea\0",
    )
    told = init(tmp_path)
    assert pairs(tmp_path) == [("a.mp4", ""), ("b/1.webm", "a cat runs"), ("b/2.MOV", "a")]
    assert (told.clips, told.lines, told.blank, told.captions) == (3, 3, [1], {".txt files beside them": 2})
    assert told.written == ["videos.txt", "prompts.txt"]
    assert "of several lines, which were joined into one caption: b/1.txt" in said(told)


TABLES = {
    "hugging face": ("videos__metadata_csv", "file_name,text\na.mp4,a cat\nb.mp4,\"a dog, asleep\"\n"),
    "hugging face, several files": ("metadata_csv", "video_file_name,text\na.mp4,a cat\nb.mp4,\"a dog, asleep\"\n"),
    "excel, of a country of commas": ("metadata_csv", "\ufeffFile_Name;Text\r\na.mp4;a cat\r\nb.mp4;a dog, asleep\r\n"),
    "cogkit": (
        "videos__metadata_jsonl",
        '{"file_name": "a.png", "id": 0}\n{"file_name": "a.mp4", "id": 0, "prompt": "a cat"}\n'
        '{"file_name": "b.mp4", "id": 1, "prompt": "a dog, asleep"}\n',
    ),
    "musubi-tuner": (
        "metadata_jsonl",
        '{"video_path": "/elsewhere/ds/videos/a.mp4", "caption": "a cat"}\n\n'
        '{"video_path": "D:\\\\ds\\\\videos\\\\b.mp4", "caption": "a dog,\\nasleep"}\n',
    ),
    "finetrainers": (
        "metadata_json",
        '[{"video": "videos/a.mp4", "caption": "a cat"}, {"video": "./videos/b.mp4", "caption": "a dog, asleep"}]',
    ),
    "data": (
        "metadata_json",
        '{"data": [{"path": "a.mp4", "caption": "a cat"}, {"path": "b.mp4", "text": "a dog, asleep"}]}',
    ),
    "diffusion-pipe": ("videos__captions_json", '{"a.mp4": ["a cat"], "b.mp4": ["a dog, asleep"]}'),
    "names and captions": ("metadata_json", '{"videos/a.mp4": "a cat", "videos/b.mp4": {"caption": "a dog, asleep"}}'),
    "utf-16": ("metadata_csv", "file_name,text\na.mp4,a cat\nb.mp4,\"a dog, asleep\"\n".encode("utf-16")),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_captions_from_each_form_of_table(tmp_path, table):
    name, text = TABLES[table]
    told = init(lay(tmp_path, "videos/a.mp4", "videos/b.mp4", **{name: text}))
    assert pairs(tmp_path) == [("videos/a.mp4", "a cat"), ("videos/b.mp4", "a dog, asleep")]
    assert sum(told.captions.values()) == 2
    assert not told.notes


def test_several_captions_make_several_lines(tmp_path):
    init(lay(tmp_path, "a.mp4", "b.mp4", captions_json='{"a.mp4": ["one", "two", "one", " "], "b.mp4": []}'))
    assert pairs(tmp_path) == [("a.mp4", "one"), ("a.mp4", "two"), ("b.mp4", "")]


def test_clips_of_one_stem_are_told_apart(tmp_path):
    """Beside each other they share a text; in two folders they do not, whatever a table's bare name may mean."""
    lay(tmp_path, "a.mp4", "a.mov", "b/a.mov", "c/d.mp4", "e/d.mp4", "f/g.mp4", a_txt="of a", b__a_txt="of b")
    lay(tmp_path, metadata_csv="file_name,text\nd.mp4,whose?\ngone/g.mp4,no longer there\nb/a.mov,another\n")
    told = init(tmp_path)
    assert pairs(tmp_path) == [
        ("a.mov", "of a"), ("a.mp4", "of a"), ("b/a.mov", "of b"), ("c/d.mp4", ""), ("e/d.mp4", ""), ("f/g.mp4", ""),
    ]  # fmt: skip
    assert "used for each: a.txt" in said(told)
    assert "metadata.csv names 2 clips not in this folder: d.mp4, gone/g.mp4" in said(told)
    assert "metadata.csv has another caption for 1 clip, which was not used: b/a.mov" in said(told)


def test_lines_of_clips_whose_names_have_no_kind(tmp_path):
    """A camera, or somebody, left the ending away; a dot of the folder is none."""
    lay(tmp_path, "2024.06/a", "b", "2024.06/a.png", "b.png", videos_txt="2024.06/a\nb\n")
    (tmp_path / "2024.06" / "a.txt").write_text("a cat")
    (tmp_path / "2024.txt").write_text("of no clip")
    told = init(tmp_path)
    assert (tmp_path / "prompts.txt").read_text() == "a cat\n\n" and told.blank == [2]
    assert (tmp_path / "images.txt").read_text() == "2024.06/a.png\nb.png\n"


def test_a_parquet_table_and_one_of_another_name(tmp_path):
    """Parquet as datasets writes it: a clip inside is known by its path, and its bytes are not read."""
    video = {"bytes": b"\0" * 9, "path": "videos/b.mp4"}
    table = pa.table({"video": [{"bytes": None, "path": "a.mp4"}, video], "Text": ["a cat", "a dog"], "fps": [8, 8]})
    parquet.write_table(table, lay(tmp_path, "a.mp4", "videos/b.mp4", "videos/c.mp4") / "metadata.parquet")
    lay(tmp_path, videos__captions_tsv="file_name\ttext\nc.mp4\ta bird, asleep\n")
    told = init(tmp_path)
    assert told.captions == {"metadata.parquet": 2}
    assert pairs(tmp_path) == [("a.mp4", "a cat"), ("videos/b.mp4", "a dog"), ("videos/c.mp4", "")]
    (note,) = told.notes
    assert note.startswith("not read: videos/captions.tsv; for the captions in videos/captions.tsv: `mv -n ")
    move, again = note.split("`")[1].rsplit(" && ", 1)
    subprocess.run(move, shell=True, check=True)
    assert again == f"cogprep init {tmp_path}" and init(tmp_path).notes == []
    assert pairs(tmp_path)[2] == ("videos/c.mp4", "a bird, asleep")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataRootError, match="not Parquet"):
        init(tmp_path, add=True)


def test_a_table_names_more_clips_than_the_list_that_is_there(tmp_path):
    lay(tmp_path, "c0.mp4", "c1.mp4", videos_txt="c1.mp4\n", metadata_csv="file_name,text\nc0.mp4,0\nc1.mp4,1\n")
    told = init(tmp_path)
    assert (told.notes, told.unlisted, told.captions) == ([], ["c0.mp4"], {"metadata.csv": 1})


def test_of_two_tables_the_first_is_believed_and_both_are_told(tmp_path):
    lay(tmp_path, "a.mp4", "b.mp4", metadata_csv="file_name,text\na.mp4,one\n")
    told = init(
        lay(tmp_path, metadata_jsonl='{"file_name": "a.mp4", "text": "two"}\n{"file_name": "b.mp4", "text": "b"}\n')
    )
    assert pairs(tmp_path) == [("a.mp4", "one"), ("b.mp4", "b")]
    assert told.captions == {"metadata.csv": 1, "metadata.jsonl": 1}
    assert said(told) == "metadata.jsonl has another caption for 1 clip, which was not used: a.mp4"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("metadata.jsonl", b'{"file_name": "a.mp4", "text": "a"}\n{"file_name"\n', 2),
        ("metadata.jsonl", b"[" * 100_000, None),
        ("metadata.jsonl", b'"a.mp4"\n', 1),
        ("metadata.json", b'{"file_name": "a.mp4",\n "text": }', 2),
        ("metadata.json", b"3", None),
        ("metadata.csv", b"file_name,text\na.mp4,a cat, asleep\n", 2),
        ("metadata.csv", b'file_name,text\na.mp4,"a cat\nb.mp4,a dog\n', 2),
        ("metadata.csv", b"file_name,text\na.mp4,caf\xe9\n", 2),
    ],
)
def test_a_damaged_table_is_named_with_its_line_and_nothing_is_written(tmp_path, name, text, line):
    lay(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataRootError) as caught:
        init(tmp_path)
    assert caught.value.where == str(tmp_path / name) + (f":{line}" if line else "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", name]


def test_a_table_without_captions_is_told_with_its_columns(tmp_path):
    told = init(lay(tmp_path, "a.mp4", metadata_csv="file_name,label\na.mp4,dog\n"))
    assert pairs(tmp_path) == [("a.mp4", "")]
    assert said(told) == (
        "no caption from metadata.csv: no column of captions (caption, text, prompt); it has file_name, label"
    )


def test_what_is_no_clip_of_ones_own_is_left_out_and_told(tmp_path):
    lay(tmp_path, "a.mp4", "a.HEIC", "b.mp4", "b.mp4.part", "c.mp4.crdownload", ".hidden.mp4", "._a.mp4")
    lay(tmp_path, ".cache/d.mp4", "__MACOSX/a.mp4", "run/.cogtune.json", "run/validation/v.mp4")
    lay(tmp_path, "out/contract.json", "out/p/x.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "nowhere.mp4").symlink_to("gone.mp4")
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    told = init(tmp_path)
    assert [clip for clip, _ in pairs(tmp_path)] == ["a.mp4"]
    assert sorted(told.notes) == [
        "left out, HEIC, which cannot be read here: save them as PNG or JPEG: a.HEIC",
        "left out, empty (0 bytes): empty.mp4",
        "left out, half-downloaded: b.mp4, b.mp4.part, c.mp4.crdownload",
        "left out, hidden: ._a.mp4, .hidden.mp4",
        "left out, links that point nowhere: circle.mp4, nowhere.mp4",
        "left out, made by cogprep or cogtrain: out/, run/",
        "left out, not regular files: pipe.mp4",
    ]


def test_links_are_followed_and_no_folder_is_listed_twice(tmp_path):
    lay(tmp_path, "ds/b/1.mp4", "elsewhere/2.mp4")
    for link, target in {"all": "b", "b/up": "..", "far": "../elsewhere", "again.mp4": "b/1.mp4"}.items():
        (tmp_path / "ds" / link).symlink_to(target)
    init(tmp_path / "ds")
    assert [clip for clip, _ in pairs(tmp_path / "ds")] == ["again.mp4", "b/1.mp4", "far/2.mp4"]


def test_names_that_a_list_reads_back_and_names_that_it_cannot_hold(tmp_path):
    odd = [" first.mp4", "a#t=1,2.mp4", "b\u200b.mp4", 'c d, "e".mp4', "ü/é.mp4"]
    lay(tmp_path, *odd, "two\nlines.mp4", os.fsdecode(b"\xff.mp4"))
    told = init(tmp_path)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne\n")
    sources = [sample.source for sample in read_lists(tmp_path, task="t2v").trusted().samples]
    assert [os.path.normpath(source) for source in sources] == odd
    assert all((tmp_path / source).is_file() for source in sources)
    assert "names that a list cannot hold (not UTF-8, or with a line break): rename them: two\nlines.mp4" in said(told)


def test_images_of_the_same_names_beside_the_clips_or_in_images(tmp_path):
    told = init(lay(tmp_path, "videos/x/1.mp4", "2.mp4", "images/x/1.JPG", "images/x/1.png", "2.webp", "3.png"))
    assert told.written == ["videos.txt", "prompts.txt", "images.txt"]
    assert (tmp_path / "images.txt").read_text() == "2.webp\nimages/x/1.png\n"
    assert (
        said(told) == "in no line, since images.txt pairs each clip with a picture: 1 picture of no clip's name: 3.png"
    )
    assert told.pictures == 0


def test_no_list_of_images_that_lacks_some(tmp_path):
    told = init(lay(tmp_path, "1.mp4", "2.mp4", "2.png"))
    assert told.written == ["videos.txt", "prompts.txt"]
    assert said(told) == "no images.txt: only 1 of 2 clips have a picture of their name, and all must"


def test_pictures_of_no_clips_name_are_lines_after_the_clips(tmp_path, capsys):
    lay(tmp_path, "b.mp4", "b.png", "c.mp4", "2/d.JPG", "a.webp", "e.png.part", "._a.png", **{"2__d_txt": "a tree"})
    run(InitSettings(ds=tmp_path))
    assert pairs(tmp_path) == [("b.mp4", ""), ("c.mp4", ""), ("2/d.JPG", "a tree"), ("a.webp", "")]
    shown = capsys.readouterr().out
    assert "2 clips and 2 pictures\n" in shown and "2 pictures of no clip's name: 2/d.JPG, a.webp; each is" in shown
    assert "--resolution 49x480x720 1x480x720" in shown
    lay(tmp_path / "photos", "a.png")
    assert (init(tmp_path / "photos").pictures, pairs(tmp_path / "photos")) == (1, [("a.png", "")])


def test_a_list_that_is_there_is_never_touched(tmp_path, capsys):
    lay(tmp_path, "a.mp4", "b.mp4", "c.mp4", a_txt="of a", b_txt="of b", videos_txt="b.mp4\n./a.mp4\n")
    told = init(tmp_path)
    assert (told.written, told.kept, told.unlisted) == (["prompts.txt"], ["videos.txt"], ["c.mp4"])
    assert pairs(tmp_path) == [("b.mp4", "of b"), ("./a.mp4", "of a")]
    again = init(tmp_path)
    assert (again.written, again.kept, again.blank) == ([], ["videos.txt", "prompts.txt"], [])
    (tmp_path / "prompts.txt").write_text("\nof a\n\n")
    run(InitSettings(ds=tmp_path))
    shown = capsys.readouterr().out
    assert f"blank line of {tmp_path / 'prompts.txt'} (1 line: 1);" in shown, "still to be done before validate"
    assert f"in no line of videos.txt: c.mp4; to add them to the lists: cogprep init {tmp_path} --add" in shown
    (tmp_path / "prompts.txt").write_text("of b\nof a\n")
    (tmp_path / "videos.txt").unlink()
    with pytest.raises(DataRootError, match=r"prompts.txt is there, but no videos.txt") as caught:
        init(tmp_path)
    assert f"mv -n {tmp_path}/prompts.txt {tmp_path}/prompts.txt.old && cogprep init {tmp_path}" in str(caught.value)
    assert (tmp_path / "prompts.txt").read_text() == "of b\nof a\n"
    (tmp_path / "videos.txt").symlink_to("nowhere.txt")
    with pytest.raises(DataRootError, match="cannot be used"):
        init(tmp_path)


def test_a_folder_without_clips_says_what_is_in_it(tmp_path):
    with pytest.raises(DataRootError, match="no clips") as caught:
        init(lay(tmp_path, "b.mp4.part", ".a.png"))
    assert "left out: half-downloaded: b.mp4.part" in str(caught.value)
    with pytest.raises(DataRootError, match="made by cogprep"):
        init(lay(tmp_path, "contract.json"))


def test_thousands_of_clips_in_many_folders(tmp_path):
    lay(tmp_path, *(f"{folder}/{clip}.mp4" for folder in range(40) for clip in range(50)))
    assert init(tmp_path).clips == 2000


# ---- as a person types it


def cogprep(*words: object, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", "cogprep", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_from_clips_alone_to_a_plan_by_what_each_message_says(tmp_path, draw_clip):
    """Without lists both commands name init, before any model is looked for; its own lists then lack only captions."""
    root = tmp_path / "my clips"
    for number in range(2):
        draw_clip(root / "videos" / f"{number}.mp4", number)
    line = f"`cogprep init '{root}'`"
    for command in ("validate", "encode"):
        refused = cogprep(command, "--data-root", root, "--resolution", "9x64x96")
        assert refused.returncode == 2
        assert line in refused.stderr
    assert (init(root).written, init(root).written) == (["videos.txt", "prompts.txt"], [])
    settings = ValidateSettings(data_root=root, resolution=["9x64x96"], model="tiny", out=tmp_path / "out", workers=1)
    assert [str(fault) for fault in read_lists(root, task="t2v").faults] == [
        f"prompts.txt:{number + 1}: no caption yet for videos/{number}.mp4" for number in range(2)
    ]
    (root / "prompts.txt").write_text("a wave\nanother wave\n")
    verdict = validate(settings)
    assert (verdict.usable, verdict.faults) == (2, [])


def test_it_loads_no_torch_and_says_all_in_json(tmp_path):
    lay(tmp_path, "a.mp4", "b.mp4", a_txt="of a")
    done = cogprep("init", tmp_path, "--json", python=("-X", "importtime"))
    assert not {"torch", "av", "pyarrow", "transformers"} & {line.split()[-1] for line in done.stderr.splitlines()}
    assert json.loads(done.stdout) == {
        "data_root": str(tmp_path), "clips": 2, "pictures": 0, "lines": 2, "captions": {".txt files beside them": 1},
        "blank": [2], "images": 0, "added": [], "written": ["videos.txt", "prompts.txt"], "kept": [], "unlisted": [],
        "notes": [],
    }  # fmt: skip
