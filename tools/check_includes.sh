#!/bin/sh
# Checks the layering of the C and CUDA sources under a folder (default: the working folder):
#   - includes go only downward: api -> server -> pager -> kernels -> base; bench sees base and
#     kernels/backend.h; sim sees server and below, and nobody sees sim;
#     server/main.c, which puts the program together, may see everything
#   - above kernels/, its one door is kernels/backend.h; an x_internal.h stays in its folder
#   - libuv and llhttp in api/ and bench/ alone; CUDA, oneDNN, OpenMP, NCCL, MPI in kernels/ alone;
#     kernels/cuda/primitives.cuh may take the emulation of CUDA from tests/
#   - file names are unique across the tree
# Prints one line per violation and exits 1 when there are any. tests/ may include everything.
set -eu
cd "${1:-.}"

sources() {
    find api base bench kernels pager server sim tests demo -type f \
        \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null | sort
}
files=$(sources)
if [ -z "$files" ]; then
    echo "check_includes: no sources under $(pwd)"
    exit 1
fi

{
    for file in $files; do
        sed -n "s|^[[:space:]]*#[[:space:]]*include[[:space:]]*\(.*\)|$file \1|p" "$file"
    done | awk '
        BEGIN { rank["base"] = 1; rank["kernels"] = 2; rank["pager"] = 3; rank["server"] = 4
                rank["sim"] = 4.5; rank["api"] = 5 }
        function folder(path) { sub("/[^/]*$", "", path); return path }
        function top(path) { sub("/.*", "", path); return path }
        {
            file = $1; from = top(file)
            if (from == "tests" || from == "demo" || file == "server/main.c") next
            if (file == "kernels/cuda/primitives.cuh" && $2 ~ /tests\/emulation\/emulate.h/) next
            name = $2; gsub("[<>\"]", "", name)
            if (name ~ /^(uv|llhttp)(\.h|\/)/ && from != "api" && from != "bench")
                print file ": " name " belongs to api/ and bench/ alone"
            if (name ~ /^(cuda|cublas|cub\/|cooperative_groups|mma|dnnl|oneapi\/|omp\.h|nccl|mpi\.h)/ \
                && from != "kernels")
                print file ": " name " belongs to kernels/ alone"
            if ($2 !~ /^"/) next
            to = top(name)
            if (name !~ /\// || !(to in rank || to == "bench" || to == "tests" || to == "demo")) {
                print file ": " name " must be given from the root of the tree"
                next
            }
            if (from == "sim" && name == "bench/workload.h") next
            if (from == "bench" ? to != "bench" && to != "base" && to != "kernels" \
                : !(to in rank) || rank[to] > rank[from] || (to == "sim" && from != "sim"))
                print file ": " from "/ must not include " name
            else if (to == "kernels" && from != "kernels" && name != "kernels/backend.h")
                print file ": the door of kernels/ is kernels/backend.h, not " name
            if (name ~ /_internal\.(h|cuh)$/ && folder(name) != folder(file))
                print file ": " name " is for its own folder"
        }'
    printf '%s\n' $files | awk -F/ '
        $NF in seen { print $0 ": the same file name as " seen[$NF] }
        { seen[$NF] = $0 }'
} | {
    violations=$(cat)
    [ -n "$violations" ] || exit 0
    printf '%s\n' "$violations"
    exit 1
}
