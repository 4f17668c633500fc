# All targets except `gpu`, `help` and `clean` first create the environment .venv, if it is missing or out of date.
# That needs Python 3.11 to 3.14 with its venv module, and access to PyPI.
PYTHON ?= python3
CONSTRAINTS ?= --constraint constraints.txt
RUN := .venv/bin/python -m
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --maxprocesses 8
PACKAGES := amapo_loss kernels benchmarks tests

# The folder of the results of a benchmark. Those in benchmarks/results are committed, and `make tables` reads them.
export RESULTS ?= build/results

VERSIONS ?= 1.0.0 1.9.0 1.14.1 1.15.0
TORCH ?= 2.8.0 2.9.1 2.10.0 2.11.0 2.15.0
TESTS ?= tests/loss tests/logps
FRAMEWORKS ?= llamafactory openrlhf swift axolotl torchtune
STUDIES := ranking ablation batch-size gradient-flow composition perplexity oracle beta reasoning negative-mean
# Without these settings, glibc gives large tensors back to the system and requests them again in each step, which takes
# a third of the run time.
STUDY := MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 $(RUN) benchmarks.studies
SIZES = $(RESULTS)/sizes
RATES ?= 1e-4 3e-4 1e-3 3e-3 1e-2 3e-2
EXTRA_FILES = $(if $(RM_BENCH),--rm-bench $(RM_BENCH)) $(if $(ALSO_EVAL),--also-eval $(ALSO_EVAL))
LANGUAGE_MODEL = $(if $(MODEL),--model "$(MODEL)" --learning-rate $(RATES))
FILES = $(if $(DATA),--data "$(DATA)") $(if $(EVAL),--eval "$(EVAL)")

.PHONY: demo compare test lint bench head sass trainer scaling estimators runs figures tables trl torch deepspeed frameworks gpu help clean sizes pretrained studies $(STUDIES)

demo: .venv/ready  ## Train with DPO, SimPO and AMaPO. DATA= and EVAL= take your own files of pairs.
	$(RUN) benchmarks.demo $(FILES) $(ARGS)

compare: .venv/ready  ## Train with thirteen losses of docs/losses.md. DATA= and EVAL= take your own files of pairs.
	$(RUN) benchmarks.compare $(FILES) $(ARGS)

test: .venv/ready  ## Run every test that needs neither a GPU nor a framework. ARGS= takes options and files for pytest.
	$(PYTEST) --doctest-modules --ignore=amapo_loss/__main__.py $(ARGS)

lint: .venv/ready  ## Check the style with Ruff and the types with mypy.
	$(RUN) ruff check $(PACKAGES)
	$(RUN) ruff format --check $(PACKAGES)
	$(RUN) mypy

bench: .venv/ready  ## Measure the latency of the loss against the authors' released trainer.
	$(RUN) benchmarks.speed.latency $(ARGS)

head: .venv/ready  ## Measure time, memory and error of the language-model head against other implementations.
	$(RUN) benchmarks.speed.head $(ARGS)

sass: .venv/ready  ## Count registers, barriers and instructions of the kernels, compiled for GPUs that need not be present.
	$(RUN) benchmarks.speed.sass $(ARGS)

trainer: .venv/ready  ## Measure a training step of AMaPOTrainer against one of DPOTrainer.
	$(RUN) benchmarks.speed.trainer $(ARGS)

scaling: .venv/ready  ## Count what a head costs on many ranks, and measure 1, 2, 4 and 8 processes.
	$(RUN) benchmarks.speed.scaling $(ARGS)

estimators: .venv/ready  ## Measure the error of micro-batch statistics for each estimator.
	$(RUN) benchmarks.studies.estimators $(ARGS)

runs: .venv/ready  ## Draw the diagnostics of a healthy run and of failing runs.
	$(RUN) benchmarks.figures.runs $(ARGS)

figures: .venv/ready  ## Draw the margins of the two formulas, the margins and gradients of all losses, and the pretrained model.
	$(RUN) benchmarks.figures.formulas
	$(RUN) benchmarks.figures.losses
	$(RUN) benchmarks.figures.pretrained

tables: .venv/ready  ## Write the tables of README.md and docs/ from the JSON files in benchmarks/results.
	$(RUN) benchmarks.tables

pretrained: .venv/ready  ## Write the language model SmolLM2-135M-Instruct into build/, which the studies take with MODEL=.
	$(RUN) benchmarks.studies.pretrained $(ARGS)

studies: .venv/ready  ## Run all studies of docs/studies.md. DATA=, EVAL=, RM_BENCH= and ALSO_EVAL= take your own files, and MODEL= a model.
	$(STUDY) all $(FILES) $(EXTRA_FILES) $(LANGUAGE_MODEL) $(ARGS)

$(STUDIES): .venv/ready  ## Run one study. It takes the same variables.
	$(STUDY) $@ $(FILES) $(EXTRA_FILES) $(LANGUAGE_MODEL) $(ARGS)

sizes: .venv/ready  ## Compare gradients in byte models of 0.1, 1 and 11 million parameters and in MODEL=. It takes the same variables.
	$(STUDY) gradient-flow $(FILES) --scale sizes --width 64 --layers 2 --out "$(SIZES)/0.1M" $(ARGS)
	$(STUDY) gradient-flow $(FILES) --scale sizes --width 192 --layers 3 --out "$(SIZES)/1M" $(ARGS)
	$(STUDY) gradient-flow $(FILES) --scale sizes --width 512 --layers 5 --out "$(SIZES)/10M" $(ARGS)
	$(if $(MODEL),$(STUDY) gradient-flow $(FILES) $(EXTRA_FILES) $(LANGUAGE_MODEL) --out "$(SIZES)/$$(basename "$(MODEL)")" $(ARGS))
	$(RUN) benchmarks.figures.sizes

# PYTHONPATH is absolute, because some tests start processes in another folder.
trl: .venv/ready  ## Run the tests of the trainer with other versions of TRL. VERSIONS= takes a list of them.
	@for version in $(VERSIONS); do \
		echo "TRL $$version"; \
		$(RUN) pip install --quiet --no-deps --upgrade --target build/trl/$$version trl==$$version && \
		PYTHONPATH="$(CURDIR)/build/trl/$$version" $(PYTEST) tests/integrations/test_trl.py tests/integrations/test_sharded.py $(ARGS) || exit 1; \
	done

# The interpreters of Triton up to 3.6 need numpy < 2.4.
torch: .venv/ready  ## Run the tests of the loss and the log-probs with other versions of PyTorch. TORCH= and TESTS= take lists.
	@for version in $(TORCH); do \
		echo "torch $$version"; \
		$(RUN) pip install --quiet --upgrade --target build/torch/$$version torch==$$version "numpy<2.4" && \
		PYTHONPATH="$(CURDIR)/build/torch/$$version" $(PYTEST) $(TESTS) $(ARGS) || exit 1; \
	done

deepspeed: .venv/ready  ## Install DeepSpeed, and run the tests of the trainer on two processes with ZeRO-2 and ZeRO-3.
	$(RUN) pip install --quiet --no-deps --upgrade --target build/deepspeed --requirement tests/integrations/deepspeed.txt
	PYTHONPATH="$(CURDIR)/build/deepspeed" $(PYTEST) tests/integrations/test_sharded.py -k ZeRO $(ARGS)

frameworks: .venv/ready  ## Install training frameworks, and run the recipes of docs/recipes.md in them. FRAMEWORKS= takes a list.
	@for name in $(FRAMEWORKS); do \
		$(RUN) pip install --quiet --no-deps --upgrade --target build/frameworks/$$name --requirement tests/frameworks/$$name.txt && \
		PYTHONPATH="$(CURDIR)/build/frameworks/$$name" $(PYTEST) tests/frameworks -k $$name $(ARGS) || exit 1; \
	done

gpu:  ## Run the GPU tests and the benchmarks with the PyTorch that is installed. Results go to build/gpu.
	benchmarks/speed/gpu.sh

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z$$].*:.*## / { sub(/^\$$\(STUDIES\)/, "STUDY", $$1); printf "%-11s %s\n", $$1, $$2 }' Makefile
	@echo "STUDY is one of: $(STUDIES)."

clean:  ## Delete the environment and all build products, also the results in build/.
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@
