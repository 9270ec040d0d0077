# make run   quantize a real model and run it        make test   all tests
# make lint  formatters and type checker             make sanitize   C++ tests under ASan and UBSan
# make bench a short benchmark, on the GPU if there is one
# make wheel the wheel, audited, into dist/           make spills     compiles the CUDA kernels for sm_80 and sm_90a
# make live  tests against the packages of .ci/live.txt
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUTLASS_VERSION := 4.2.0.0
export CUTLASS_HOME ?= $(CURDIR)/$(VENV)/cutlass/cutlass_library/source
CPP := $(shell git ls-files 'kernels/*.hpp' 'kernels/*.cpp' 'kernels/*.cu' 'kernels/*.cuh' 'cutlass_ext/*.hpp' \
         'cutlass_ext/*.cpp' 'cutlass_ext/*.h' 'examples/*.hpp' 'examples/*.cpp' 'tests/*.cpp' 'tests/*.hpp' 'tests/*.c')
BUILD_INPUTS := setup.py pyproject.toml pyquant/formats.py $(shell git ls-files kernels cutlass_ext)

.PHONY: run test live lint format sanitize spills bench wheel clean

run: $(VENV)/.demo
	$(BIN)/python examples/quantize_minilm.py

test: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The tests that need bitsandbytes, hqq or another producer of checkpoints, most of which `make test` skips.
LIVE_TESTS := tests/test_load_live.py tests/test_accelerate.py tests/test_accelerate_hqq.py \
              tests/test_accelerate_gptq.py tests/test_accelerate_awq.py tests/test_docs_accelerate.py tests/test_hf_convert.py \
              tests/test_matmul_4bit.py tests/test_training.py tests/test_peft.py tests/test_bench_model_accelerated.py
live: $(VENV)/.live
	PYQUANT_LIVE=1 $(VENV)/live/bin/python -m pytest $(PYTEST_ARGS) $(LIVE_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: $(VENV)/.tools
	PYQUANT_CUDA=off $(BIN)/cmake -S cutlass_ext -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCX_SANITIZE=ON -DCX_TESTS=ON -DCX_TORCH=OFF
	$(BIN)/cmake --build build/sanitize
	build/sanitize/contract_test
	build/sanitize/plan_test
	build/sanitize/simt_plan_test
	build/sanitize/transposed_plan_test
	build/sanitize/wgmma_plan_test
	build/sanitize/table_test

spills: $(VENV)/.tools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/check_spills.py

bench: $(VENV)/.build
	$(BIN)/python -m pyquant bench

# From the source distribution, as pip would build it. Its folder is inside the clone, where ccache knows the paths.
wheel: $(VENV)/.dev
	rm -rf build/wheel && mkdir -p build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" TMPDIR="$(CURDIR)/build/wheel" \
	  $(BIN)/python -m build --no-isolation --outdir build/wheel
	$(BIN)/python scripts/check_wheel.py build/wheel/*.whl --out dist
	mv build/wheel/*.tar.gz dist/

# The environment: build tools, then the package in development mode (its libraries go to pyquant/lib). Torch first,
# because the libraries are built against its headers. CUTLASS headers only where nvcc is, beside the environment: its
# Python part, and the many packages that part needs, are of no use here.
$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "torch>=2.11" "setuptools>=77" "cmake>=3.24" ninja
	if command -v nvcc >/dev/null; then \
	  $(BIN)/python -m pip install -q --no-deps --target $(VENV)/cutlass nvidia-cutlass==$(CUTLASS_VERSION); fi
	touch $@

$(VENV)/.build: $(VENV)/.tools $(BUILD_INPUTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[$*]"
	touch $@

# An environment of its own over the other one, whose packages it sees: the tests of `make test` stay without the
# producers', as most users are. No dependencies, since some of them would bring another torch.
$(VENV)/.live: $(VENV)/.dev .ci/live.txt
	$(BIN)/python -m venv --clear --without-pip $(VENV)/live
	site() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  echo "import site; site.addsitedir('$$(site $(CURDIR)/$(VENV))')" > "$$(site $(VENV)/live)/base.pth"
	$(BIN)/python -m pip --python $(VENV)/live/bin/python install -q --no-deps -r .ci/live.txt
	touch $@

clean:
	rm -rf $(VENV) build dist out pyquant/lib pyquant/include *.egg-info
