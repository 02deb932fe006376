# Thin lines over `python -m extract|train_head|evaluate VERB CONFIG [key=value ...]`.
# Settings go on the command line: make train CONFIG=ytvis2019_r50 data.root=/data/ytvis_2019
# CONFIG is a file, or the short name of one in configs/; V=1 says more, and shows tracebacks.
CONFIG ?= demo
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Of `make predict`: KEEP_CACHE names a folder that its cache goes to and stays in.
HEAD ?= runs/demo
OUTPUT ?= runs/predictions
STRIDE ?= 1
SCORE ?= 0.3
# Of `make compare`: DIFFER=1 compares runs of unequal terms, and says so.
COMPARISON ?= runs/comparison
NAMES := V SMALL BESIDE RUNS COMPARISON DIFFER CONFIG PYTHON VENV VIDEO HEAD OUTPUT STRIDE SCORE KEEP_CACHE
# make parts values at their spaces: what has no = is the rest of one.
# make writes a space within a value as "\ "; it must not part words.
GIVEN := $(filter-out $(NAMES:%=%=%),$(subst \ ,<space>,$(MAKEOVERRIDES)))
OVERRIDES := $(subst <space>,\ ,$(GIVEN)) $(if $(V),-v)
# On no registry; the commit that the golden numbers were recorded with.
DETECTRON2 := git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833
.DEFAULT_GOAL := help
# What was typed, for what commands say when they are stopped: cache/command.py.
export MAKE_TYPED ?= make $(MAKECMDGOALS) $(MAKEOVERRIDES)

# The demo needs nothing but itself, so each of its stages makes sure of the one before.
ifneq ($(filter demo configs/demo.yaml,$(CONFIG)),)
extract bench: demo-data
train: extract
evaluate: train
report: evaluate
ifeq ($(HEAD)$(wildcard runs/demo/checkpoint.pt),runs/demo)
predict: train
endif
endif

# Before the first stage of what comes before it starts.
ifneq ($(filter predict,$(MAKECMDGOALS)),)
ifneq ($(shell awk -v s='$(SCORE)' 'BEGIN { print s == s + 0 && 0 <= s && s <= 1 }'),1)
$(error SCORE: not a score (expected 0 to 1, got $(SCORE)))
endif
endif

.PHONY: torture finetune demo-compare demo-frozen demo-finetuned bench doctor fuzz help demo demo-data demo-detector extract train evaluate report compare predict test lint install detectron2

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo "Behind any of them: CONFIG=name (a file, or one of configs/), key=value (settings: configs/schema.py), V=1 (says more)"

install: $(STAMP)  ## make .venv and install everything into it

$(STAMP): pyproject.toml
	@if command -v uv >/dev/null 2>&1; then uv venv -q --allow-existing --seed $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@echo "installing into $(VENV) (PyTorch is large: minutes, 5 GB)"
	@if command -v uv >/dev/null 2>&1; then uv pip install -q --python $(PY) -e '.[dev]'; else $(PY) -m pip install -q -e '.[dev]'; fi
	@touch $@

demo: demo-data extract train evaluate report  ## the whole pipeline on generated videos: 3 to 8 minutes on 2 cores after the installation

demo-data: $(STAMP)  ## generate the demo's videos
	@$(PY) -m extract demo-data $(CONFIG) $(OVERRIDES)

demo-detector: $(STAMP)  ## retrain the demo's detector from nothing
	$(PY) -m extract.demo.train_detector

extract: $(STAMP)  ## stage one: frozen detector -> feature cache
	@$(PY) -m extract run $(CONFIG) $(OVERRIDES)

train: $(STAMP)  ## stage two: train the head from the cache
	@$(PY) -m train_head train $(CONFIG) $(OVERRIDES)

finetune: $(STAMP)  ## train the detector too, from images: its result is runs/<name>/detector for `make extract`
	@$(PY) -m train_head finetune $(CONFIG) $(OVERRIDES)

evaluate: $(STAMP)  ## AP of the trained head and of the training-free baseline
	@$(PY) -m evaluate run $(CONFIG) $(OVERRIDES)

report: $(STAMP)  ## one self-contained HTML page of a run [BESIDE="runs/other ..."]
	@$(PY) -m evaluate report $(CONFIG) $(OVERRIDES) $(BESIDE:%=--beside %)

# The shell reads VIDEO and KEEP_CACHE itself, so that their names may hold anything.
export VIDEO KEEP_CACHE
predict: HEAD_CONFIG = $(firstword $(wildcard $(HEAD)/config.yaml) $(CONFIG))
predict: $(STAMP)  ## your own video: VIDEO=clip.mp4 (or a folder, or a list) [HEAD=runs/...] -> tracks, overlay, contact sheet
	@mkdir -p "$(OUTPUT)" && temporary=$$(mktemp -d "$(OUTPUT)/.cache.XXXXXX") && \
	trap 'rm -rf "$$temporary"' EXIT && trap 'exit 130' INT TERM HUP && \
	features=$${KEEP_CACHE:-$$temporary} && video=$${VIDEO:-$(OUTPUT)/demo.mp4} && \
	{ [ -n "$$VIDEO" ] || $(PY) -m extract demo-clip "$$video"; } && \
	$(PY) -m extract video --head "$(HEAD)" --stride $(STRIDE) "$(HEAD_CONFIG)" "$$video" cache.path="$$features" $(OVERRIDES) && \
	$(PY) -m evaluate predict --head "$(HEAD)" --output "$(OUTPUT)" --score $(SCORE) "$(HEAD_CONFIG)" "$$features/video" $(OVERRIDES)

compare: $(STAMP)  ## RUNS="runs/a runs/b": what differs, whether it is real, where it comes from
	@$(if $(RUNS),,$(error no runs to compare. Hint: RUNS="runs/a runs/b", or RUNS="name=runs/a-* other=runs/b-*"))
	@$(PY) -m evaluate compare $(RUNS) --output $(COMPARISON) $(if $(DIFFER),--allow-differences)

# Frozen against fine-tuned demo detector, each with three seeds of a head: two lanes of one core each.
TUNED := detector.weights=runs/demo_finetune/detector cache.path=caches/demo_finetuned
HEADS = $(PY) -m train_head sweep configs/demo.yaml seed=0,1,2 train.iterations=600 train.decay_steps=[450]
demo-compare: demo-data  ## the demo's Table 7: what freezing the detector costs, and why; under 15 minutes
	@OMP_NUM_THREADS=1 $(MAKE) -j2 demo-frozen demo-finetuned
	@$(PY) -m evaluate compare frozen=runs/demo-frozen/* fine-tuned=runs/demo-finetuned/* --output runs/demo-comparison

demo-frozen: $(STAMP)  ## a half of demo-compare
	@$(PY) -m extract run configs/demo.yaml $(OVERRIDES)
	@$(HEADS) runs=runs/demo-frozen $(OVERRIDES)

demo-finetuned: $(STAMP)  ## the other half
	@$(PY) -m train_head finetune configs/demo_finetune.yaml $(OVERRIDES)
	@$(PY) -m extract run configs/demo.yaml $(TUNED) $(OVERRIDES)
	@$(HEADS) runs=runs/demo-finetuned $(TUNED) $(OVERRIDES)

detectron2: $(STAMP)  ## the engine for your own detectron2 models (compiles, minutes); also needs their code in PYTHONPATH
	$(PY) -m pip install -q setuptools timm opencv-python-headless
	$(PY) -m pip install --no-build-isolation "$(DETECTRON2)"

doctor: $(STAMP)  ## when something fails: check machine, disk, data and weights, with remedies
	@$(PY) -m extract doctor $(CONFIG) $(OVERRIDES)

bench: $(STAMP)  ## a training step against the live detector; reading, workers, inference, extraction [SMALL=1: only that they run]
	$(PY) -m cache bench --json bench.json $(if $(SMALL),--scale 0.01)
	$(PY) -m train_head.bench.loader --json runs/bench_loader.json $(if $(SMALL),--scale 0.01)
	$(PY) -m train_head bench --output runs/bench_step.json $(if $(SMALL),--small)
	$(PY) -m evaluate bench --output runs/bench_inference.json $(if $(SMALL),--small)
	$(PY) -m extract bench --output runs/bench_extraction.json $(if $(SMALL),--small) $(CONFIG) $(if $(SMALL),cache.calibration_frames=6) $(OVERRIDES)

# Each of the many processes of the suite would compile this repository anew.
test: export PYTHONDONTWRITEBYTECODE =
test: $(STAMP)  ## the test suite, CPU only
	$(PY) -m pytest -m "not slow" -rs -n 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

fuzz: $(STAMP)  ## damaged files of every kind, thousands of times, and what became of them
	FUZZ_EXAMPLES=5000 $(PY) -m pytest tests/test_fuzz.py --hypothesis-show-statistics --timeout=3600

torture: $(STAMP)  ## kill extraction, training and export 70 times; all must end as if undisturbed
	OMP_NUM_THREADS=1 $(PY) -m tests.torture --kills 50
