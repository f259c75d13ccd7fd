# Everything runs in the project's own virtual environment, .venv; each target makes it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-full test-gpu bench-encode bench-train bench-check check readme venv clean

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cogtune needs Python 3.11 or newer; name one with make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@echo "setting up .venv: PyTorch and what else is needed, some gigabytes; for minutes nothing more is said"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch>=2.8" setuptools
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# Teach the built-in model a motion that it has never seen, beside more clips of what it knows, so that it
# keeps that: draw, encode, train a LoRA, compare. Stopped, it goes on where it was; rm -rf demo begins anew.
ENCODE := $(BIN)/cogprep encode --resolution 17x64x96 --model tiny
demo: export GOMP_SPINCOUNT ?= 10000
demo: venv
	$(BIN)/python -m workshop.draw demo/new --clips 28 --new "shrinks slowly"
	$(BIN)/python -m workshop.draw demo/known --clips 72
	$(ENCODE) --data-root demo/new --holdout 4 --out demo/shards/new
	$(ENCODE) --data-root demo/known --out demo/shards/known
	$(BIN)/cogprep preview demo/shards/new --samples 4
	$(BIN)/cogtrain lora --shards demo/shards/*/*.tar --validate-shards demo/shards/new/val/*.tar --steps 360 --validate-every 120 --lr 2e-3 --lr-schedule cosine --batch-size 4 --rank 64 --ema 0.98 --timesteps stratified --out demo/run
	$(BIN)/python -m workshop.pretrain concept demo/run --clips 24
	$(BIN)/cogtrain generate --run demo/run --prompt "sks A red ring shrinks slowly on warm sand." --steps 20 --guidance 2 --out demo/videos
	@echo; echo "look at: demo/run/concept.webp, demo/run/report.html, demo/videos, demo/shards/new/preview/index.html"; echo "your own clips: put them into ds/, then: source .venv/bin/activate && cogprep init ds/"

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	@mkdir -p build/names && for side in common prep train; do ln -sfn ../../$$side build/names/cog$$side; done; ln -sfn ../../workshop build/names/workshop
	$(BIN)/mypy

# Test files side by side: make test JOBS=8. One thread a process: two processes of two threads on two cores
# wait for each other (2.5 to 6 times slower). In their order: files of few long tests would else come last, one alone.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) -m "not gpu and not full"

test-full: check
	$(PYTEST) -m "not gpu"

# On a machine with a GPU: copies beside the computation, kernels, fp16, every strategy, the peaks of a 5B (4 minutes).
test-gpu: venv
	$(BIN)/pytest -m gpu

# How fast this machine's GPU encodes, beside a plain serial loop; random weights of true shape, 11 GB of disk.
bench-encode: venv
	rm -rf build/bench-encode
	$(BIN)/python -m workshop.bench_encode build/bench-encode

# Seconds and peak memory of the LoRA step on this machine's GPU, beside a plain diffusers + PEFT loop.
bench-train: venv
	rm -rf build/bench-train
	$(BIN)/python -m workshop.bench_train --out build/bench-train

# Three of those rows, and by how many percent each has moved from what train/memory/measured.jsonl has of this GPU.
bench-check: venv
	rm -rf build/bench-check
	$(BIN)/python -m workshop.bench_train --check --out build/bench-check

clean:
	rm -rf .venv build demo *.egg-info

# Write the README's tables of options anew from the settings.
readme: venv
	$(BIN)/python -m workshop.pages
