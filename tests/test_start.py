"""Which libraries a command imports: each takes a second or more of everybody who types it.

What imports what, on two cores, seconds of one: torch 0.7; with CUDA about 2; its compiler's front end, which diffusers
imports, 0.7; diffusers' transformers with PEFT 0.8; transformers 0.5, its T5 1.1; accelerate 0.1, DeepSpeed 0.3 and
more where there is a GPU. `python -m workshop.bench_start --imports` measures them.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time

import pytest

from cogcommon.libraries import importing
from cogcommon.model import remembered
from cogcommon.model.tiny import builtin_folder

HEAVY = {
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "diffusers", "transformers",
    "transformers.models.t5.modeling_t5", "peft", "accelerate", "deepspeed",
}  # fmt: skip
# Often installed beside them, and imported by pyarrow and transformers if they are found; stand-ins here.
BESIDE = ("pandas", "scipy", "sklearn")
TRAINING = {"torch", "torch._dynamo", "diffusers", "transformers", "peft", "accelerate"}
RUN = """
import atexit, importlib, json, sys
heavy, program, sys.argv = json.loads(sys.argv[1]), sys.argv[2], sys.argv[2:]
atexit.register(lambda: print("imported", json.dumps([name for name in heavy if name in sys.modules])))
importlib.import_module(f"{program}.cli").main()
"""


@pytest.fixture(scope="module", autouse=True)
def _installed_beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    for name in BESIDE:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("__version__ = '99.0'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


def imported(*words: str) -> set[str]:
    """Of the libraries that matter here, those that a command has imported at its end; torch's threads hardly spin."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(sorted({*HEAVY, *BESIDE})), *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},  # libgomp says its settings when torch loads it
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) <= {"10000"}, "threads that wait keep cores"
    return set(json.loads(done.stdout.rpartition("imported ")[2]))


@pytest.fixture(scope="module")
def old_model():
    """A built-in model whose files are old enough for what is found out about them to be kept."""
    newest = max(file.stat().st_ctime_ns for file in builtin_folder("random-tiny").rglob("*"))
    time.sleep(max(0, newest + remembered._YOUNG_NS - time.time_ns()) / 1e9)
    return "random-tiny"


@pytest.mark.parametrize("program", ["cogprep", "cogtrain"])
def test_help_imports_nothing(program):
    assert imported(program, "--help") == set()


def test_plan_of_a_model_imports_nothing():
    assert imported("cogtrain", "plan", "--model", "THUDM/CogVideoX-5b", "--gpu", "4090") == set()


def test_commands_over_shards_import_what_runs(tmp_path, make_shards, old_model):
    """One after the other, since each leaves what the next is asked about."""
    tars = list(map(str, make_shards(tmp_path / "out", old_model, samples=2)))
    lora = ("cogtrain", "lora", "--shards", *tars, "--steps", "1", "--out", str(tmp_path / "run"))
    assert imported(*lora) == TRAINING  # DeepSpeed is for who asks for it; nothing is compiled on a CPU
    # The weights have been looked at.
    assert imported("cogtrain", "plan", "--shards", *tars, "--gpu", "4090") == set()


def test_an_encode_with_nothing_to_do_imports_no_library(tmp_path, old_model):
    from workshop.draw import write_data_set

    write_data_set(tmp_path / "ds", 2, seed=0)
    words = ("--data-root", str(tmp_path / "ds"), "--resolution", "9x32x48", "--model", old_model)
    encode = ("cogprep", "encode", *words, "--out", str(tmp_path / "out"))
    assert "transformers.models.t5.modeling_t5" in imported(*encode)
    assert imported(*encode) == set()
    assert imported("cogprep", "validate", *words, "--out", str(tmp_path / "out")) == {"transformers"}


def test_while_libraries_are_imported_nobody_searches_for_garbage():
    @importing()
    def inside():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
        raise KeyError

    assert gc.isenabled()
    with pytest.raises(KeyError):
        inside()
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled(), "it was so before"
    finally:
        gc.enable()
