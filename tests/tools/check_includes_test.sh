#!/bin/sh
# Seeds one violation at a time into a clean little tree: tools/check_includes.sh must name each.
set -eu
check=$1/tools/check_includes.sh
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

clean_tree() {
    rm -rf "$tree"
    mkdir -p "$tree/base" "$tree/kernels/cpu" "$tree/pager" "$tree/server/model" "$tree/api" \
        "$tree/bench" "$tree/sim" "$tree/tests/unit"
    echo '#include <stdio.h>' >"$tree/base/low.c"
    echo '#include "base/low.h"
#include <dnnl.h>' >"$tree/kernels/cpu/matmul.c"
    echo '#include "kernels/backend.h"' >"$tree/pager/pages.c"
    echo '#include "pager/pages_internal.h"' >>"$tree/pager/pages.c"
    echo '#include "api/listen.h"' >"$tree/server/main.c"
    echo '#include "pager/pages.h"' >"$tree/server/model/run.c"
    echo '#include <uv.h>
#include "server/engine.h"' >"$tree/api/listen.c"
    echo '#include <llhttp.h>
#include "base/low.h"
#include "bench/client.h"' >"$tree/bench/client.c"
    echo '#include "server/engine.h"
#include "bench/workload.h"' >"$tree/sim/play.c"
    echo '#include "kernels/cpu/matmul.h"' >"$tree/tests/unit/all.c"
}

clean_tree
if ! "$check" "$tree"; then
    echo "a clean tree is refused"
    exit 1
fi

# FILE | LINE ADDED TO IT | WHAT THE CHECK MUST SAY
failed=0
while IFS='|' read -r file line says; do
    clean_tree
    echo "$line" >>"$tree/$file"
    if output=$("$check" "$tree"); then
        echo "not caught: $line in $file"
        failed=1
    elif ! printf '%s\n' "$output" | grep -qF "$file: $says"; then
        echo "caught, but not as '$file: $says': $output"
        failed=1
    fi
done <<'CASES'
base/low.c|#include "kernels/backend.h"|base/ must not include kernels/backend.h
kernels/cpu/matmul.c|#include "pager/pages.h"|kernels/ must not include pager/pages.h
pager/pages.c|  #  include "server/engine.h"|pager/ must not include server/engine.h
server/model/run.c|#include "api/listen.h"|server/ must not include api/listen.h
server/model/run.c|#include "kernels/cpu/matmul.h"|the door of kernels/
server/model/run.c|#include "pager/pages_internal.h"|pager/pages_internal.h is for its own folder
api/listen.c|#include "bench/client.h"|api/ must not include bench/client.h
api/listen.c|#include "tests/unit/fake.h"|api/ must not include tests/unit/fake.h
api/listen.c|#include "listen.h"|listen.h must be given from the root
api/listen.c|#include "sim/play.h"|api/ must not include sim/play.h
server/model/run.c|#include "sim/play.h"|server/ must not include sim/play.h
sim/play.c|#include "bench/client.h"|sim/ must not include bench/client.h
sim/play.c|#include "api/listen.h"|sim/ must not include api/listen.h
bench/client.c|#include "server/engine.h"|bench/ must not include server/engine.h
server/model/run.c|#include <uv.h>|uv.h belongs to api/ and bench/ alone
pager/pages.c|#include <llhttp.h>|llhttp.h belongs to api/ and bench/ alone
pager/pages.c|#include <cuda_runtime.h>|cuda_runtime.h belongs to kernels/ alone
api/listen.c|#include <oneapi/dnnl/dnnl.h>|oneapi/dnnl/dnnl.h belongs to kernels/ alone
server/model/run.c|#include <omp.h>|omp.h belongs to kernels/ alone
tests/unit/low.c|// second|the same file name as base/low.c
CASES

rm -rf "$tree"
mkdir -p "$tree"
if "$check" "$tree" >/dev/null; then
    echo "an empty tree is accepted"
    failed=1
fi
exit $failed
