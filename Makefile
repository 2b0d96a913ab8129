# make demo: the quickstart on this machine · make test: the tests · make check: all checks
.DEFAULT_GOAL := demo
.PHONY: .venv demo test test-rollout test-cluster image image-gpu check format mlflow clean

PYTHON ?= python3
STAMP := .venv/.installed
TORCH := $(shell grep '^torch==' requirements-cpu.lock)
TORCH_INDEX := https://download.pytorch.org/whl/cpu
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' zephyr_ray/__init__.py)
BUILDER ?= $(notdir $(firstword $(shell command -v podman docker buildah)))
# DeepSpeed compiles its operators with the venv's ninja.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

include helm/chart.mk

.venv: $(STAMP)

# Few indexes have torch's CPU build: try the configured ones first, then PyTorch's own.
$(STAMP): requirements-cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zephyr_ray needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@command -v g++ >/dev/null || \
		{ echo "g++ is missing: DeepSpeed compiles its operators with it (apt-get install g++)"; exit 1; }
	@echo "Setting up .venv: 3.5 GB, several minutes"
	@$(PYTHON) -m venv .venv || { echo "python venv failed (apt-get install python3-venv)"; exit 1; }
	@.venv/bin/pip install -q --no-deps "$(TORCH)" || { \
		echo "$(TORCH) is not on the configured indexes; trying $(TORCH_INDEX)"; \
		.venv/bin/pip install -q --no-deps --index-url $(TORCH_INDEX) "$(TORCH)"; }
	.venv/bin/pip install -q --no-deps -r requirements-cpu.lock
	.venv/bin/pip install -q --no-deps -e .
	@touch $@

demo: $(STAMP)
	.venv/bin/python -m zephyr_ray.pipeline configs/quickstart.yaml

test: $(STAMP) $(TOOLS)
	.venv/bin/python -m pytest

test-rollout: $(STAMP)
	.venv/bin/python -m pytest -m rollout

# The chart's pods as podman containers, with kills. Needs root and the image; takes 7 minutes.
test-cluster: $(STAMP) $(TOOLS)
	.venv/bin/python -m pytest -m cluster -n 0 -s

# Uses podman, docker or buildah. IMAGE_FLAGS may set a proxy, a package index or a base digest.
image:
	$(BUILDER) build --target cpu --tag zephyr-ray:$(VERSION) \
		--build-arg TORCH_INDEX=$(TORCH_INDEX) $(IMAGE_FLAGS) .

image-gpu:
	$(BUILDER) build --target gpu --tag zephyr-ray:$(VERSION)-gpu $(IMAGE_FLAGS) .

check: $(STAMP) $(TOOLS)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m pytest

format: $(STAMP)
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

mlflow: $(STAMP)
	@mkdir -p runs
	.venv/bin/mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
		--backend-store-uri sqlite:///runs/mlflow.db --artifacts-destination runs/mlartifacts

# Removes the environment, the tools and their caches; keeps the results in runs/.
clean:
	rm -rf .venv .tools .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
