#!/bin/sh
# What ptxas says of every CUDA kernel (registers, spills, shared memory), as the Markdown table of
# docs/kernels.md. Needs nvcc.   tools/ptxas_report.sh [sm_90a]
set -eu
cd "$(dirname "$0")/.."
arch=${1:-sm_90a}
echo "| kernel ($arch) | registers | spilled bytes | static shared bytes |"
echo "|---|---:|---:|---:|"
for file in kernels/cuda/*.cu; do
    nvcc -std=c++17 -O3 -D_GNU_SOURCE -I. -arch="$arch" -Xptxas -v -c "$file" -o /dev/null 2>&1
done | c++filt | awk '
    /Compiling entry function/ { sub(/.*function ./, ""); sub(/. for .*/, ""); name = $0 }
    /spill stores/ { spilled = $5 + $9 }
    /Used [0-9]+ registers/ {
        registers = $0; sub(/.*Used /, "", registers); sub(/ registers.*/, "", registers)
        shared = 0
        if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH) + 0
        print name "|" registers "|" spilled "|" shared
    }' | while IFS='|' read -r name registers spilled shared; do
    printf '| `%s` | %s | %s | %s |\n' "$(echo "$name" | c++filt | sed 's/(.*//; s/^void //')" \
        "$registers" "$spilled" "$shared"
done
