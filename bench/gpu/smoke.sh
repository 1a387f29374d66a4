#!/bin/bash
# The first thing to run where there is a GPU: builds with nvcc and a C compiler alone, then holds
# every operation of the CUDA backend against the references of tests/unit/test_backend_cpu.c on the
# device, f32 and bf16. Under a minute.
#   bench/gpu/smoke.sh            SANITIZE=1: under compute-sanitizer as well
#   BUILD_ONLY=1                  compiles and links, for machines without a GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${SMOKE_BUILD:-build-smoke}
mkdir -p "$out"
arch=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 |
    tr -d . || true)}
[ "${arch:-90}" = 90 ] && arch=90a
flags="-O2 -D_GNU_SOURCE -DLORAD_GPU=1 -I."
objects=()
for file in kernels/cuda/*.cu; do
    objects+=("$out/$(basename "$file").o")
    nvcc -std=c++17 $flags -lineinfo -arch="sm_$arch" -c "$file" -o "${objects[-1]}" &
done
for file in base/{dtype,file,status,log,memory,utf8}.c kernels/algorithm_cache.c bench/gpu/cuda_host_ops.c server/sampler.c \
    tests/unit/test_backend_cpu.c; do
    objects+=("$out/$(basename "$file").o")
    gcc -std=gnu17 -ffp-contract=off $flags -Ibench/gpu/shim -c "$file" -o "${objects[-1]}" &
done
for job in $(jobs -p); do wait "$job"; done
nvcc -arch="sm_$arch" "${objects[@]}" -o "$out/smoke" -ldl -lpthread -lm
echo "built $out/smoke for sm_$arch"
[ -z "${BUILD_ONLY:-}" ] || exit 0
export LORAD_CACHE_DIR=$out/cache
"$out/smoke"
[ -z "${SANITIZE:-}" ] || compute-sanitizer --error-exitcode 1 "$out/smoke"
