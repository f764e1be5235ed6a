# Everything sets itself up: a machine with Python >= 3.11 and make is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: test test-oldest test-newest fuzz check quickstart ask audit elsewhere gpu-wheels constraints clean

# The tested versions; where an index does not have them any more, the newest that pyproject.toml allows, which is said.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("nesso-tune needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt || { \
	  echo "constraints.txt cannot be met here: installing other versions, which were not tested" >&2; \
	  $(BIN)/python -m pip install --quiet --editable '.[dev]'; }
	touch $@

# Many tests wait, so one process more than the cores of a small machine; long files early. The interpreters that tests
# start find compiled modules, also where the environment forbids them.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The fast part of the suite with the oldest versions that pyproject.toml declares, and with the newest releases, which may
# be beyond its upper bounds. On Linux, pip takes the CUDA build of torch, which runs without a GPU too, and checks more;
# TORCH_INDEX names another index for torch, such as that of the CPU builds on pytorch.org.
ENDS := tests/model/test_fake_cuda.py tests/model/test_flash.py tests/model/test_cuda.py tests/model/test_attention.py \
  tests/model/test_lm_head.py tests/model/test_compiled_layers.py tests/training/test_fsdp.py tests/training/test_sft.py tests/training/test_dpo_step.py \
  tests/training/test_adapters.py tests/distributed/test_shared_step.py tests/runs/test_checkpoint.py tests/test_run.py
test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pip list 2>/dev/null | grep -iE '^(torch|transformers|trl|accelerate|datasets|peft|tokenizers|numpy|pyarrow|pydantic) '
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile $(ENDS)

.venv-%/.ready: pyproject.toml scripts/version_range.py
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) scripts/version_range.py $* > .venv-$*/requirements.txt
	$(if $(TORCH_INDEX),.venv-$*/bin/python -m pip install --quiet --index-url $(TORCH_INDEX) "$$(grep '^torch[=>]' .venv-$*/requirements.txt)")
	.venv-$*/bin/python -m pip install --quiet --requirement .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The property tests with fresh examples for half an hour: by hand, before a release.
FUZZ_MINUTES ?= 30
fuzz: $(READY)
	$(BIN)/python scripts/fuzz.py --minutes $(FUZZ_MINUTES) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED)) $(FUZZ_PATHS)

# SFT, then DPO, then two questions to the result; README.md says how long it takes.
quickstart: $(READY)
	$(BIN)/nesso-tune train quickstart/sft quickstart/dpo
	@echo
	@$(MAKE) --no-print-directory ask PROMPT="Qual è la capitale d'Italia?"
	@$(MAKE) --no-print-directory ask PROMPT="What is the capital of Italy?"
	@echo "metrics: outputs/quickstart/sft/metrics.jsonl and outputs/quickstart/dpo/metrics.jsonl"
	@echo "talk to it: $(BIN)/nesso-tune chat outputs/quickstart/dpo/final"

ask: $(READY)
	@echo "> $(PROMPT)"
	@$(BIN)/nesso-tune chat outputs/quickstart/dpo/final --prompt "$(PROMPT)"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known faults of the versions that are installed; it asks a database on the network.
audit: $(READY)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# final/ in transformers 4.57, lm-eval, gguf and plain Jinja, which get an environment of their own; see docs/final.md.
elsewhere: $(READY)
	$(BIN)/python -m tests.benchmarks.elsewhere --folder $(VENV)/elsewhere

# Packages for a GPU machine without a network: a folder of wheels for scripts/gpu_smoke.py and scripts/gpu_benchmark.py.
gpu-wheels: $(READY)
	$(BIN)/python scripts/gpu_wheels.py .gpu-wheels

# Writes what is installed into constraints.txt: after `make clean test` with newer versions.
constraints: $(READY)
	sed -i '/^[^#]/d' constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest outputs
