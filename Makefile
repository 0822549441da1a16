PYTHON ?= python3
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
# Pins that `make lock` must not raise by itself, as results are compared across runs of one torch. Its CUDA build pins
# this triton.
HELD := torch==2.13.0 torchvision==0.28.0 triton==3.7.1

# Fails with one line instead of a resolver's page of "no matching distribution". Old Pythons must be able to run it.
define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hmn needs Python >= 3.11, found " \
	+ sys.version.split()[0] + " as $(PYTHON): name a newer one with PYTHON=, as in make setup PYTHON=python3.12")'
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed ## make .venv with the locked packages (PYTHON=python3 chooses the interpreter)

.venv/.installed: requirements.lock pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	@echo "Installing requirements.lock into .venv: minutes the first time"
	.venv/bin/python $(PIP_INSTALL) -r requirements.lock
	.venv/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## condense, prune and evaluate the embedded digits
	.venv/bin/python run.py experiment=demo

# GPUs are hidden so that all machines run the same tests; `.venv/bin/python -m pytest -m gpu` runs those that need one.
# Two processes with one thread are faster than one with two. Files are not split, as their tests share finished runs.
test: setup ## run the test suite on the CPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Nothing else should run at the same time. Options are passed on, as in make bench BENCH="--rounds 3 --data DIR".
bench: setup ## time all formulations against the plain loop: three quarters of an hour on two cores
	.venv/bin/python -m benchmarks $(BENCH)

lint: setup ## check style and formatting
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

# Use the oldest supported Python: newer ones get releases that it cannot install. The suffix of torch's build (+cpu,
# +cu...) and the CUDA packages that torch's own metadata pins are left out.
lock: ## rewrite requirements.lock from a fresh environment (with Python 3.11)
	$(CHECK_PYTHON)
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP_INSTALL) $(HELD) -e '.[dev]'
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable > build/lock/frozen.txt
	@{ echo "# Made by \`make lock\` with $$(build/lock/bin/python --version), not by hand."; \
	echo "# Every package of hmn[dev] and what they need, for Python >= 3.11. Neither the build of torch"; \
	echo "# nor an index is named: pip takes the CPU build where that is offered, else the CUDA build with the CUDA"; \
	echo "# packages that torch pins itself. No hashes, as wheels differ by platform."; \
	sed -E -e 's/\+[A-Za-z0-9.]+$$//' -e '/^(nvidia-|cuda-)/d' \
		-e 's/^triton==.*/&; platform_system == "Linux"/' build/lock/frozen.txt; \
	} > build/lock/requirements.lock
	mv build/lock/requirements.lock requirements.lock
	rm -rf build/lock

clean: ## remove what the other targets made; runs/, data/, .cache/, outputs/ and wandb/ stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
