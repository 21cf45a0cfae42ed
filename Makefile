# Two commands: `make demo` samples the embedded model, `make test` checks the project. Needs python3 and make only.
#   make demo PROMPT="a penguin walks on a pink background" OUTPUT=penguin.mp4
PYTHON ?= python3
PROMPT ?= a rocket flies up on a purple background
OUTPUT ?= demo.mp4
SEED ?= 1
WORKERS ?= 2
BIN := .venv/bin
RUN_STAMP := .venv/.installed
TEST_STAMP := .venv/.installed-for-tests

.PHONY: demo test links
.DELETE_ON_ERROR:

demo: links $(RUN_STAMP)
	$(BIN)/walt sample "$(PROMPT)" -o "$(OUTPUT)" --seed $(SEED)
	@echo "The video is $(abspath $(OUTPUT))"

test: links $(TEST_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

# A copy that lost the links (an archive, a file system without them) gets them back.
links:
	@for name in tokenizers pipelines configs; do \
		test -d walt/$$name || { rm -f walt/$$name && ln -s ../$$name walt/$$name; }; \
	done
	@for name in text_encoder tokenizer; do \
		test -d walt/embedded_nuwa/$$name || \
			{ rm -f walt/embedded_nuwa/$$name && ln -s ../embedded/$$name walt/embedded_nuwa/$$name; }; \
	done

# One environment, two stamps: an installation is repeated only after pyproject.toml changed.
$(BIN)/python:
	$(PYTHON) -m venv .venv

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $(RUN_STAMP) $@
