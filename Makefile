# The commands of lorad; CMake and Ninja do the work.
#   make serve [PORT=8000] [MODEL=DIR]   build, then serve the demo model and its adapters
#   make test                            build, then run every test
#   make compare                         lorad against other engines on this machine (bench/compare)
#   make bench-check                     instruction counts against bench/baseline.json
#   make build | bench | format | lint | clean | setup
BUILD ?= build
PORT ?= 8000
MODEL ?= demo/model
ADAPTERS ?= demo/adapters
NAME ?= $(if $(filter demo/model,$(MODEL)),lorad-demo,$(notdir $(MODEL)))
CMAKE_FLAGS ?=
VENV := $(BUILD)/venv
C_FILES = git ls-files '*.c' '*.h' '*.cu' '*.cuh'

.PHONY: all setup build serve test bench bench-check compare format lint clean
all: build

setup:
	@tools/setup.sh

$(BUILD)/build.ninja: | setup
	cmake -G Ninja -S . -B $(BUILD) $(CMAKE_FLAGS) \
	    $$(command -v ccache >/dev/null && echo -DCMAKE_C_COMPILER_LAUNCHER=ccache)

build: setup $(BUILD)/build.ninja
	ninja -C $(BUILD)

serve: setup $(BUILD)/build.ninja
	ninja -C $(BUILD) lorad
	@echo 'Once "listening on" is printed, ask from another terminal:'
	@echo "  curl http://127.0.0.1:$(PORT)/v1/models"
	@echo "  curl http://127.0.0.1:$(PORT)/v1/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\":\"kjv\",\"prompt\":\"In the\",\"max_tokens\":40}'"
	exec $(BUILD)/lorad serve --model $(MODEL) --served-model-name $(NAME) \
	    --adapter-dir $(ADAPTERS) --port $(PORT)

# The Python clients that the end-to-end tests use; made once for each tests/requirements.txt.
$(VENV)/ready: tests/requirements.txt | setup
	rm -rf $(VENV)
	mkdir -p $(BUILD)
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

test: build $(VENV)/ready
	ctest --test-dir $(BUILD) --output-on-failure $(CTEST_FLAGS)

bench: setup $(BUILD)/build.ninja
	ninja -C $(BUILD) lorad lorad-bench
	@echo "built $(BUILD)/lorad-bench; bench/README.md says how figures are made"

bench-check: build
	bench/check.py

compare: bench
	bench/compare/run.sh

format:
	$(C_FILES) | xargs clang-format -i

lint: $(BUILD)/build.ninja
	tools/check_includes.sh .
	$(C_FILES) | grep -E '^(api|base|kernels|pager|server|sim)/.*\.c$$' | \
	    xargs -n 8 -P "$$(nproc)" clang-tidy --quiet -p $(BUILD)

clean:
	rm -rf $(BUILD)
