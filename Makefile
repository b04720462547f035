# `make` alone lists what can be done here. A machine needs only git, make, bash and Python 3.10 to 3.13.
BIN := .venv/bin
READY := .venv/.ready
# The page of the measured spectrum shows stored outputs: the files and trained networks it reads are not in the repository,
# and nbconvert, unlike nbdev_test, does not heed its "eval: false". Name it in NB where you have them.
STORED := nbs/tutorials/measured_spectrum.ipynb
NB ?= $(filter-out $(STORED),$(shell git ls-files -co --exclude-standard 'nbs/*.ipynb'))
OUT ?= demo
STEPS ?=
RUNS ?= .
APP := nbs/tutorials/explorers.ipynb
EXTRA := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser app lab notebooks sync docs docs-check bench hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

$(READY): settings.ini setup.py pyproject.toml constraints.txt .ci/install
	@.ci/install

demo: $(READY) ## a small run of each half, from simulation to an answer with its uncertainty; OUT=demo
	@$(BIN)/deadlayer demo --out $(OUT)
	@$(BIN)/cres demo --out $(OUT)/cres

test: $(READY) ## every check of the continuous integration; STEPS="style notebooks" for some of them
	@.ci/checks $(STEPS)

test-browser: $(READY) ## the explorers in a real browser; screenshots in .build/browser
	@.ci/browser

app: $(READY) ## the explorers as a web page; RUNS=folder with your spectra and runs
	@test -d "$(RUNS)" || { echo "RUNS=$(RUNS): no such folder" >&2; exit 1; }
	@$(BIN)/python -c "import voila" 2> /dev/null || { echo "installing voila"; $(EXTRA) voila; }
	@DEADLAYER_CRES_RUNS="$(abspath $(RUNS))" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/voila $(APP)

lab: $(READY) ## JupyterLab on the notebooks; they are cleaned as they are saved
	@PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter \
		--LabApp.default_url=/lab/tree/nbs

notebooks: $(READY) ## execute the notebooks, store their outputs, clean and export; NB=nbs/00_core.ipynb for one
	@for nb in $(NB); do \
		echo "$$nb"; \
		TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace \
			--ExecutePreprocessor.timeout=1800 --ExecutePreprocessor.store_widget_state=False "$$nb" || exit 1; \
	done
	@.ci/sync

sync: $(READY) ## clean the notebooks, export the modules, write README.md
	@.ci/sync

docs: $(READY) ## the documentation site, in _docs; needs Quarto
	@command -v quarto > /dev/null || { \
		echo "make docs needs the program quarto: install version 1.4 or newer from quarto.org, then run make docs again;"; \
		echo "make docs-check checks the pages without it"; exit 1; } >&2
	@$(BIN)/python .ci/docs_check.py
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs && .ci/sync && echo "open _docs/index.html"

docs-check: $(READY) ## sidebar, links, references, titles, alt texts, outputs and the page of the benchmarks; without Quarto
	@$(BIN)/python .ci/docs_check.py

bench: $(READY) ## every bench/bench_*.py in turn; their numbers go to bench/results, and from there to their page
	@for script in $(sort $(wildcard bench/bench_*.py)); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done
	@$(BIN)/python bench/page.py

hooks: $(READY) ## git hooks of this clone: clean notebooks before a commit, merge them cell by cell
	@git config --local core.hooksPath .githooks
	@git config --local merge.nbdev-merge.name "merge notebooks cell by cell"
	@git config --local merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"
	@git config --local merge.regenerate.name "keep ours: make sync writes it anew"
	@git config --local merge.regenerate.driver true
	@echo "hooks installed; undo with: git config --unset core.hooksPath"

clean: ## remove the environments and everything built
	rm -rf .venv .venv-wheel .venv-newest .build build dist _docs _proc *.egg-info .ruff_cache .pytest_cache
