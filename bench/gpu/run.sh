#!/bin/bash
# The one call on a GPU machine: correctness, then figures, inside ten minutes. Carry build-gpu/bin
# (bench/gpu/pack.sh makes it); results go to $OUT (default bench/results). A stage that fails is
# reported and the next ones run; the exit status is the number of stages that failed.
# At most ten files come out.
#   EMULATE=1   the same stages on this processor, tiny shapes, CUDA emulated (build/ must be built)
#   STAGES="operations greedy roofline lora serve peers"   which to run
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-bench/results}
bin=${BIN:-build-gpu/bin}
commit=$(git rev-parse HEAD 2>/dev/null || cat build-gpu/commit 2>/dev/null || echo unknown)
stages=${STAGES:-operations greedy roofline lora serve peers}
emulate=${EMULATE:-}
lorad=$bin/lorad
cuda_lorad=$lorad
bench=$bin/lorad-bench
if [ -n "$emulate" ]; then
    build=${BUILD:-build}
    lorad=$build/lorad
    cuda_lorad=$build/tests/emulation/lorad-emulated
    bench=$build/lorad-bench
fi
mkdir -p "$out"
rm -f "$out/gpu-log.txt"
failed=0
logs=$(mktemp -d)
summary=$out/gpu-summary.md
device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null ||
    echo "no GPU: emulated")
printf '# GPU run\n\n%s, %s, commit %s\n\n| stage | s | result |\n|---|---:|---|\n' "$device" \
    "$(date -u +%F)" "$commit" >"$summary"

stage() { # name limit_s command...
    local name=$1 limit=$2 begin=$SECONDS log=$logs/$1
    shift 2
    case " $stages " in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    if timeout "$limit" "$@" >"$log" 2>&1; then result=ok; else
        result="FAILED ($?)"
        failed=$((failed + 1))
    fi
    tail -n 12 "$log"
    { echo "== $name"; cat "$log"; } >>"$out/gpu-log.txt"
    printf '| %s | %d | %s |\n' "$name" $((SECONDS - begin)) "$result" >>"$summary"
}

operations() {
    if [ -n "$emulate" ]; then "$build/tests/emulation/test_cuda_operations"; else
        bench/gpu/smoke.sh; fi
}

greedy() {
    python3 bench/gpu/greedy.py "$lorad" cpu "$cuda_lorad" cuda
}

roofline() {
    local model=bench/models/llama-2-7b batches=1,16,32,64 peak=4096 rank
    if [ -n "$emulate" ]; then
        model=$(mktemp -d) batches=1,2 peak=16
        bench=$build/tests/emulation/lorad-bench-emulated
        sed 's/"hidden_size": 4096/"hidden_size": 256/; s/11008/256/; s/_layers": 32/_layers": 2/
             s/_heads": 32/_heads": 4/; s/32000/512/' bench/models/llama-2-7b/config.json >"$model/config.json"
    fi
    for rank in 0 16 64; do
        "$bench" roofline --device cuda --model "$model" --batch $batches --context 512 \
            --rank $rank --rounds 5 --peak-rows $peak --commit "$commit" --machine "$device" \
            --json "$out/gpu-roofline-r$rank.json" || return 1
    done
    echo "-- shrink beside the base matmul, rank 16; then without recordings"
    LORAD_CUDA_OVERLAP=1 "$bench" roofline --device cuda --model "$model" --batch $batches \
        --context 512 --rank 16 --rounds 5 --peak-rows $peak | grep -E "^M|step" || return 1
    LORAD_CUDA_GRAPHS=0 "$bench" roofline --device cuda --model "$model" --batch $batches \
        --context 512 --rank 16 --rounds 5 --peak-rows $peak | grep -E "^M|step"
}

# LoRA's kernels alone: batch by who shares an adapter by rank, on four layers of a 7B.
lora() {
    local model batches=1,8,32,64,256 peak=4096 sharing ranks layers=4 parts=()
    model=$(mktemp -d)
    if [ -n "$emulate" ]; then
        batches=1,3 peak=16 layers=1
        bench=$build/tests/emulation/lorad-bench-emulated
    fi
    sed "s/_layers\": 32/_layers\": $layers/; ${emulate:+s/4096/256/; s/11008/256/; s/_heads\": 32/_heads\": 4/}" \
        bench/models/llama-2-7b/config.json >"$model/config.json"
    for sharing in distinct one power; do
        for ranks in 8 16 64 8,16,32,64; do
            parts+=("$logs/lora-$sharing-$ranks.json")
            "$bench" roofline --device cuda --model "$model" --batch $batches --context 16 \
                --lora-only --rank $ranks --sharing $sharing --rounds 5 --peak-rows $peak \
                --commit "$commit" --machine "$device" --json "${parts[-1]}" || return 1
        done
    done
    python3 -c 'import json, sys; json.dump([json.load(open(p)) for p in sys.argv[2:]],
                                           open(sys.argv[1], "w"), indent=1)' \
        "$out/gpu-lora.json" "${parts[@]}"
}

# S-LoRA's S1 shape over the real server: 7B, rank 8 on q k v o, in and out U[8, 512]; a closed loop
# over the first 5 to all of the adapters.
serve() {
    local model=bench/models/llama-2-7b counts="5 100 1000 2000" args=() n
    local load=(--concurrency 128 --requests 500)
    local limits=(--max-step-tokens 2048 --max-seqs 256 --max-model-len 1024 --pool-bytes 48GiB
                  --host-bytes 40GiB --load-threads 8)
    if [ -n "$emulate" ]; then
        counts="2 5" load=(--concurrency 2 --requests 4 --input 4:8 --output 2:4)
        limits=(--pool-bytes 16MiB)
        model=$(mktemp -d)
        sed 's/"hidden_size": 4096/"hidden_size": 128/; s/11008/128/; s/_layers": 32/_layers": 2/
             s/_heads": 32/_heads": 4/; s/32000/512/' bench/models/llama-2-7b/config.json \
            >"$model/config.json"
    fi
    for ((i = 0; i < ${counts##* }; i++)); do
        args+=(--adapter "a$i=dummy:rank=8,seed=$i,modules=qkvo")
    done
    "$cuda_lorad" serve --model "$model" --load-format dummy --device cuda --port 18090 \
        "${limits[@]}" "${args[@]}" >"$logs/server" 2>&1 &
    local server=$! status=0
    for ((i = 0; i < 120; i++)); do
        grep -q "listening on" "$logs/server" && break
        kill -0 $server 2>/dev/null || break
        sleep 1
    done
    for n in $counts; do
        echo "-- $n adapters"
        "$bench" --url http://127.0.0.1:18090 "${load[@]}" --adapters "$n" --commit "$commit" \
            --json "$out/gpu-s1-$n.json" || status=1
    done
    kill $server
    wait $server
    tail -n 3 "$logs/server"
    return $status
}

peers() {
    local python=python3 args=(--device cuda)
    [ -z "$emulate" ] || args=(--device cpu --tiny)
    if ! $python -c "import torch" 2>/dev/null; then
        echo "no torch: left out"
        return 0
    fi
    $python bench/gpu/peers.py "${args[@]}" --commit "$commit" --json "$out/gpu-peers.json"
}

export -f operations greedy roofline lora serve peers
export out logs emulate build lorad cuda_lorad bench commit device
stage operations 110 bash -c operations
stage greedy 40 bash -c greedy
stage roofline 180 bash -c roofline
stage lora 60 bash -c lora
stage serve 140 bash -c serve
stage peers 70 bash -c peers
echo >>"$summary"
python3 tools/figures.py --gpu "$out" >>"$summary" || failed=$((failed + 1))
cat "$summary"
exit $failed
