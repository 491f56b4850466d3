# make demo: the environment, then the whole job on a synthetic hospital.   make test: the environment, then all checks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format

demo: $(READY)
	rm -rf demo
	$(BIN)/medvit-demo --output demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
# a server without libGL: the headless build serves
	$(BIN)/python -c "import cv2" || { $(BIN)/python -m pip uninstall -q -y opencv-python; \
		$(BIN)/python -m pip install -q opencv-python-headless; }
	touch $@
