# Two commands on a fresh machine: `make demo` and `make test`.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu saves several GB where there is no GPU.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CACHE := $(or $(XTUNER_TEST_CACHE),$(HOME)/.cache/xtuner-tests)
LMDEPLOY := $(CACHE)/lmdeploy-0.9.2.post1
LLAMACPP := $(CACHE)/llama-cpp-python-0.3.36
MMENGINE := $(CACHE)/mmengine-0.10.7
PEFT := $(CACHE)/peft-0.21.2
DATA_LIBRARIES := $(CACHE)/data-libraries-1
TRACKERS := $(CACHE)/trackers-2
S3CLIENT := $(CACHE)/s3-client-0.12.1
S3SERVER := $(CACHE)/s3-server-5.2.5

.PHONY: demo test test-fast check test-interop fuzz lmdeploy llamacpp mmengine peft data-libraries trackers s3 bench-table bench-several bench-data settings configs clean help

help:
	@echo "make demo   install into .venv and run every step from text to a trained, exported tiny model (minutes, no GPU)"
	@echo "make check  install into .venv, lint, check formatting and types (seconds)"
	@echo "make test-fast  the tests that start no process (a minute)"
	@echo "make test   make check, then all tests (ten minutes)"
	@echo "make lmdeploy  download LMDeploy's last converter (76 MB), the reference of a test that is skipped without it"
	@echo "make llamacpp  download llama.cpp's GGUF converter and build its tokenizer (77 MB, a minute), for a test that is skipped without them"
	@echo "make mmengine  download mmengine 0.10.7 (15 MB), the reference of a test of learning rates that is skipped without it"
	@echo "make peft  download PEFT 0.21.2 (15 MB), the reference of tests of LoRA that are skipped without it"
	@echo "make data-libraries  download megatron-core, pyarrow and datasets (100 MB), which tests of token files are skipped without"
	@echo "make trackers  download SwanLab and W&B (160 MB), for tests that are skipped without them"
	@echo "make s3  download a client (15 MB) and a server (115 MB) of object storage, for tests that are skipped without them"
	@echo "make bench-table  print the results of benchmarks/single_gpu.py"
	@echo "make bench-several  on a host with several GPUs: collectives, predicted and measured speed, peers, fault recovery (results are kept)"
	@echo "make test-interop  install OpenCompass and lm-eval (2.3 GB, once), and compare their results with ours (minutes)"
	@echo "make fuzz  malformed inputs for every reader of external files, FUZZ_SECONDS=600 for each (TARGET=name for one); failures are kept in fuzz-finds"
	@echo "make bench-data  measure the data path, next to megatron-core with PEER=python-that-has-it (FOLDER keeps the data)"
	@echo "make settings  generate the pages of all settings, docs/*/settings.md"
	@echo "make configs  generate the shipped configs, xtuner/configs/*.py, from xtuner/templates/config.txt"
	@echo "make clean  remove .venv and all generated files"

demo: .venv/installed
	$(BIN)/python demo/run.py

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not processes and not slow and not interop'

test-interop: .venv/installed
	$(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL="$(TORCH_INDEX)") $(BIN)/xtuner eval opencompass --install --env "$(CACHE)/evaluation"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m interop

FUZZ_SECONDS ?= 600
fuzz: .venv/installed
	PYTHONPATH=tests $(BIN)/python -m fuzz $(TARGET) --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

settings: .venv/installed
	$(BIN)/python -m xtuner.tools.settings_pages docs

configs: .venv/installed
	$(BIN)/python -m xtuner.tools.shipped_configs xtuner/configs

lmdeploy: $(LMDEPLOY)/installed

$(LMDEPLOY)/installed: tests/external/lmdeploy.txt | .venv/installed
	rm -rf "$(LMDEPLOY)"
	$(BIN)/python -m pip install -q --no-deps --target "$(LMDEPLOY)" -r tests/external/lmdeploy.txt
	rm -rf "$(LMDEPLOY)/lmdeploy/lib"  # 300 MB of compiled code that the converter imports but does not use
	touch "$@"

llamacpp: $(LLAMACPP)/tokenize

$(LLAMACPP)/tokenize: tests/external/llamacpp.sh tests/external/llamacpp_tokenize.cpp | .venv/installed
	PATH="$(abspath $(BIN)):$$PATH" bash tests/external/llamacpp.sh 0.3.36 "$(LLAMACPP)"

mmengine: $(MMENGINE)/installed

$(MMENGINE)/installed: tests/external/mmengine.txt | .venv/installed
	rm -rf "$(MMENGINE)"
	$(BIN)/python -m pip install -q --no-deps --target "$(MMENGINE)" -r tests/external/mmengine.txt
	touch "$@"

peft: $(PEFT)/installed

$(PEFT)/installed: tests/external/peft.txt | .venv/installed
	rm -rf "$(PEFT)"
	$(BIN)/python -m pip install -q --no-deps --target "$(PEFT)" -r tests/external/peft.txt
	touch "$@"

data-libraries: $(DATA_LIBRARIES)/installed

$(DATA_LIBRARIES)/installed: tests/external/data_libraries.txt | .venv/installed
	rm -rf "$(DATA_LIBRARIES)"
	$(BIN)/python -m pip install -q --no-deps --target "$(DATA_LIBRARIES)/site-packages" -r tests/external/data_libraries.txt
	touch "$@"

trackers: $(TRACKERS)/installed

$(TRACKERS)/installed: tests/external/trackers.txt | .venv/installed
	rm -rf "$(TRACKERS)"
	$(BIN)/python -m pip install -q --target "$(TRACKERS)" -r tests/external/trackers.txt
	touch "$@"

s3: $(S3CLIENT)/installed $(S3SERVER)/installed

$(S3CLIENT)/installed: tests/external/s3_client.txt | .venv/installed
	rm -rf "$(S3CLIENT)"
	$(BIN)/python -m pip install -q --no-deps --target "$(S3CLIENT)" -r tests/external/s3_client.txt
	touch "$@"

$(S3SERVER)/installed: tests/external/s3_server.txt | .venv/installed
	rm -rf "$(S3SERVER)"
	$(BIN)/python -m pip install -q --target "$(S3SERVER)" -r tests/external/s3_server.txt
	touch "$@"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[plot,test]'
	touch $@

bench-several: .venv/installed
	$(BIN)/python benchmarks/multi_gpu.py all

bench-table: .venv/installed
	$(BIN)/python benchmarks/single_gpu.py --table

# megatron-core, grain and OLMo-core are measured if they can be imported: PEER is the Python of an environment with them,
# rich and torch
bench-data: .venv/installed
	PYTHONPATH=. OMP_NUM_THREADS=1 $(or $(PEER),$(BIN)/python) benchmarks/data_path.py $(if $(FOLDER),--folder $(FOLDER))
	PYTHONPATH=. OMP_NUM_THREADS=1 $(or $(PEER),$(BIN)/python) benchmarks/mixture_peers.py

clean:
	rm -rf .venv build dist *.egg-info demo/out .mypy_cache .ruff_cache .pytest_cache
