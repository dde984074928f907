# make demo: the whole pipeline on generated data.  make test: the tests.  Both make their own .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test

demo: .venv/installed
	$(BIN)/python code/preprocess_demo.py
	$(BIN)/python code/main.py --dataset demo --encoder tf_efficientnet_lite0 --batch_size 32
	$(BIN)/python code/infer.py --dataset demo --untrained

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/pytest

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lite0,test]'
	touch $@
