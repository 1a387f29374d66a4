#!/bin/bash
# Makes build-gpu/: lorad and lorad-bench with CUDA, their other libraries linked in, so that they run
# on a machine that has none of our Debian packages (glibc 2.36 or later, CUDA 13's cuBLASLt). Run
# where `make setup` works; carry build-gpu/bin to the device and call bench/gpu/run.sh there.
set -euo pipefail
cd "$(dirname "$0")/../.."
cmake -G Ninja -S . -B build-gpu -DLORAD_CUDA=ON -DLORAD_STATIC=ON -DLORAD_TESTS=OFF >/dev/null
ninja -C build-gpu lorad lorad-bench
mkdir -p build-gpu/bin
for program in lorad lorad-bench; do
    strip -o "build-gpu/bin/$program" "build-gpu/$program"
    echo "$program needs:" $(ldd "build-gpu/bin/$program" | awk '{ print $1 }' | grep -v -E \
        '^(linux-vdso|/lib64/ld|libc\.|libm\.|libpthread|libdl|librt|libgcc_s|libstdc)' || true)
done
git rev-parse HEAD >build-gpu/commit
du -sh build-gpu/bin
