# Every target creates its virtual environment once and reuses it until the project file or the locks change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test check bench protos clean

quickstart: $(VENV)/.installed
	$(BIN)/fedcompute quickstart $(ARGS)

# Three at a time on two cores: half of what the tests do is waiting.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/generate_protos.py --check
	$(BIN)/python tools/generate_settings.py --check
	$(BIN)/python tools/generate_op_coverage.py --check
	$(BIN)/python -m pytest tests/test_import_floors.py

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/all.py $(ARGS)

protos: $(VENV)/.installed-dev
	$(BIN)/python tools/generate_protos.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "fedcompute needs Python 3.11 to 3.13; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (up to 2.6 GB on disk, half of it TensorFlow) ..."
	$(INSTALL) --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV) ..."
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
