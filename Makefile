# Every target sets itself up in .venv on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
RUN := .venv/bin/python -m
PACKAGES := amapo_loss kernels benchmarks tests

STUDIES := ranking ablation batch-size gradient-flow composition perplexity oracle beta
FILES = $(if $(DATA),--data "$(DATA)") $(if $(EVAL),--eval "$(EVAL)")

.PHONY: demo test lint bench head trainer estimators runs figures gpu clean studies $(STUDIES)

demo: .venv/ready  ## train with DPO, SimPO and AMaPO; DATA= and EVAL= take your own preference files
	$(RUN) benchmarks.demo $(FILES) $(ARGS)

test: .venv/ready  ## every test that needs no GPU
	$(RUN) pytest --doctest-modules --ignore=amapo_loss/__main__.py $(ARGS)

lint: .venv/ready  ## style and types
	$(RUN) ruff check $(PACKAGES)
	$(RUN) ruff format --check $(PACKAGES)
	$(RUN) mypy

bench: .venv/ready  ## time the loss against the released trainer's arithmetic
	$(RUN) benchmarks.speed.latency $(ARGS)

head: .venv/ready  ## time, memory and precision of the language-model head, against peers
	$(RUN) benchmarks.speed.head $(ARGS)

trainer: .venv/ready  ## a training step of AMaPOTrainer against one of DPOTrainer
	$(RUN) benchmarks.speed.trainer $(ARGS)

estimators: .venv/ready  ## how far micro-batches are from the whole batch, with each estimate of its statistics
	$(RUN) benchmarks.studies.estimators $(ARGS)

runs: .venv/ready  ## what the diagnostics look like in a healthy run and in failing ones
	$(RUN) benchmarks.figures.runs $(ARGS)

figures: .venv/ready  ## draw the README's picture of the two formulas
	$(RUN) benchmarks.figures.formulas $(ARGS)

studies: .venv/ready  ## all eight studies of benchmarks/README.md; DATA=, EVAL= and RM_BENCH= take your own files
	$(RUN) benchmarks.studies all $(FILES) $(if $(RM_BENCH),--rm-bench $(RM_BENCH)) $(ARGS)

$(STUDIES): .venv/ready  ## one of them
	$(RUN) benchmarks.studies $@ $(FILES) $(if $(RM_BENCH),--rm-bench $(RM_BENCH)) $(ARGS)

gpu:  ## what only a GPU can show, into build/gpu, with the PyTorch that is installed
	benchmarks/speed/gpu.sh

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
