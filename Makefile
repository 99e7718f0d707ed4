# make frontier   the recall-memory frontier, from nothing, in minutes
# make frontier-seeds   two more seeds of the same, which takes twice as long, and all of it into results/quick
# make quick      what matters most, in less than a minute: the laws in fp64, the contract, a training, a sweep
# make test       all tests but the exhaustive ones, in minutes       make test-full   those as well
# make test-portable   a slice of laws and kernels as on a processor without vector instructions
# make check      format, lint, layer fences, types
# make readme     writes the README's list of rooms       make plant       proves that a mixer is one file
# make zoo        every mixer on the quick task, its errors over great lengths, and docs/zoo.md
# make dist       builds a wheel, installs it alone into a new environment and runs it there
# make docs       the documentation site in site/, which opens without a server or a network
# make bench      speed beside its ceiling; prints tables, writes results/
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
JOBS   ?= 2
COMPILED = $(shell grep -rl "mark[.]compile" tests holdall/testing --include=*.py --exclude-dir=kernels)
SHAPES  = --jaxtyping-packages=holdall,shapes.check
SHAPED  = holdall/testing tests/ops tests/mixers tests/contract tests/analysis tests/training
PYTEST  = $(BIN)/pytest -q -n $(JOBS) --dist worksteal
# processes that tests start would compile all of Holdall again and again
unexport PYTHONDONTWRITEBYTECODE
# kernels and what torch.compile reads run apart: shape checks wrap functions that these must read as they are
# written, and Triton's interpreter is chosen for a whole process

.PHONY: readme plant frontier frontier-seeds zoo quick test test-full test-portable check docs dist bench format clean

frontier: $(VENV)/installed
	$(BIN)/holdall frontier quick

frontier-seeds: $(VENV)/installed
	$(BIN)/holdall frontier quick --seeds 3
	$(BIN)/python -m tools.results runs/quick results/quick

zoo: $(VENV)/installed
	$(BIN)/holdall frontier zoo
	$(BIN)/holdall soundness
	$(BIN)/holdall zoo --results runs/zoo --page docs/zoo.md

quick: $(VENV)/installed-dev
	$(PYTEST) -m quick --ignore=tests/kernels --ignore=tests/parity

# Shapes and types are checked around every call where tensors are made: the other rooms' tests, the engine's
# above all, would take about twice as long, and reach the same functions. test-full checks all.
test: $(VENV)/installed-dev
	$(PYTEST) -m "not compile and not full" $(SHAPES) $(SHAPED)
	$(PYTEST) -m "not compile and not full" tests --ignore=tests/kernels $(SHAPED:%=--ignore=%)
	$(PYTEST) -m "not full" tests/kernels
	$(PYTEST) -m "compile and not full" $(COMPILED)

test-full: $(VENV)/installed-dev
	$(PYTEST) -m "not compile" $(SHAPES) --ignore=tests/kernels
	$(PYTEST) tests/kernels
	$(PYTEST) -m compile $(COMPILED)

# PyTorch picks its CPU code by processor, and each adds in an order of its own: a tolerance that holds by the
# luck of one fails on another. This is the order that the processors which run the tests seldom have.
test-portable: export ATEN_CPU_CAPABILITY = default
test-portable: $(VENV)/installed-dev
	$(PYTEST) -m "not compile and not full" holdall/testing/test_laws.py tests/test_laws_go_red.py \
		tests/kernels/test_window_attention.py tests/kernels/test_gated_rms_norm.py -k "definition-fp32 or \
		(test_law_in_fp32 and bf16) or coarse or toleran or cancel or nudge or outputs_ring or as_plain"

readme: $(VENV)/installed-dev
	$(BIN)/python -m tools.readme

plant: $(VENV)/installed-dev
	JOBS=$(JOBS) $(BIN)/python -m tools.plant

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# what it warns of is an error: links and anchors that lead nowhere, names that are documented and not there
docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

# what a user gets: no extras, no files but those in the wheel
dist: $(VENV)/bin/python
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd dist && venv/bin/holdall --version && venv/bin/holdall zoo taylor && venv/bin/holdall laws base-conv \
		&& venv/bin/holdall frontier zoology-small --add retnet --dry-run && venv/bin/holdall generate --max-tokens 8

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,text,serve,parity,eval]"
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info site
