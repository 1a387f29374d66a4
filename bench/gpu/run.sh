#!/bin/bash
# The one call on a GPU machine: correctness, then figures, inside ten minutes. Carry build-gpu/bin
# (bench/gpu/pack.sh makes it); results go to $OUT (default bench/results). A stage that fails is
# reported and the next ones run; one that finds no time left is named with the call that goes on
# from there. The exit status is the number of stages that failed.
#   EMULATE=1   the same stages on this processor, tiny shapes, CUDA emulated (build/ must be built)
#   STAGES="operations greedy ..."   which to run (default: all)
#   LIMIT_S=590   for all of them
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-bench/results}
bin=${BIN:-build-gpu/bin}
commit=$(git rev-parse HEAD 2>/dev/null || cat build-gpu/commit 2>/dev/null || echo unknown)
stages=${STAGES:-operations greedy roofline lora serve peers larger sanitize}
limit_s=${LIMIT_S:-590}
emulate=${EMULATE:-}
lorad=$bin/lorad
cuda_lorad=$lorad
bench=$bin/lorad-bench
rig=$bench # the roofline
if [ -n "$emulate" ]; then
    build=${BUILD:-build}
    lorad=$build/lorad
    cuda_lorad=$build/tests/emulation/lorad-emulated
    bench=$build/lorad-bench
    rig=$build/tests/emulation/lorad-bench-emulated
fi
mkdir -p "$out"
rm -f "$out/gpu-log.txt"
failed=0
left_out=()
logs=$(mktemp -d)
summary=$out/gpu-summary.md
device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null ||
    echo "no GPU: emulated")
printf '# GPU run\n\n%s, %s, commit %s\n\n| stage | s | result |\n|---|---:|---|\n' "$device" \
    "$(date -u +%F)" "$commit" >"$summary"

stage() { # name limit_s
    local name=$1 limit=$2 begin=$SECONDS log=$logs/$1 left=$((limit_s - SECONDS)) result=ok
    case " $stages " in *" $name "*) ;; *) return ;; esac
    if [ $left -lt 15 ]; then
        left_out+=("$name")
        return
    fi
    echo "== $name"
    if ! timeout $((left < limit ? left : limit)) bash -c "$name" >"$log" 2>&1; then
        result="FAILED"
        failed=$((failed + 1))
    fi
    tail -n 12 "$log"
    { echo "== $name"; cat "$log"; } >>"$out/gpu-log.txt"
    printf '| %s | %d | %s |\n' "$name" $((SECONDS - begin)) "$result" >>"$summary"
}

# ------------------------------------------------------------------ what stages share

shape() { # model layers: a folder with its config; emulated, a tiny one. layers 0: all
    local folder tiny=() kept=()
    folder=$(mktemp -d)/$1
    mkdir "$folder"
    [ "$2" = 0 ] || kept=(-e "s/_layers\": [0-9]*/_layers\": $2/")
    [ -z "$emulate" ] || tiny=(-e 's/"hidden_size": [0-9]*/"hidden_size": 256/; s/_layers": [0-9]*/_layers": 2/
        s/_size": 1[0-9]*/_size": 256/; s/_heads": [0-9]*/_heads": 4/; s/32000/512/')
    sed "${kept[@]}" "${tiny[@]}" -e '' "bench/models/$1/config.json" >"$folder/config.json"
    echo "$folder"
}

merge() { # file parts...: into the file's list, in place of what the same commands gave before
    python3 -c 'import json, os, sys
to, parts = sys.argv[1], [json.load(open(p)) for p in sys.argv[2:]]
kept = json.load(open(to)) if os.path.exists(to) else []
again = {p["command"] for p in parts}
json.dump([k for k in kept if k["command"] not in again] + parts, open(to, "w"), indent=1)' "$@"
}

roof() { # json arguments...
    local json=$1 peak=4096
    shift
    [ -z "$emulate" ] || peak=16
    "$rig" roofline --device cuda --rounds 5 --peak-rows $peak --commit "$commit" \
        --machine "$device" --json "$json" "$@"
}

start() { # model arguments...: a server on $url
    local folder=$1 i
    shift
    "$cuda_lorad" serve --model "$folder" --load-format dummy --device cuda --port 18090 "$@" \
        >"$logs/server" 2>&1 &
    server=$! url=http://127.0.0.1:18090
    for ((i = 0; i < 1200; i++)); do
        grep -q "listening on" "$logs/server" && return 0
        kill -0 $server 2>/dev/null || break
        sleep 0.1
    done
    tail -n 5 "$logs/server"
    return 1
}

stop() {
    kill $server
    wait $server
    tail -n 3 "$logs/server"
}

load() { # json arguments...: a closed loop of S-LoRA's lengths
    local json=$1 asked=(--concurrency 128 --requests 384)
    shift
    [ -z "$emulate" ] || asked=(--concurrency 2 --requests 4 --input 4:8 --output 2:4)
    "$bench" --url $url "${asked[@]}" --commit "$commit" --json "$json" "$@"
}

dummies() { # prefix first count modules ranks...: --adapter arguments, ranks in turn
    local prefix=$1 first=$2 count=$3 modules=$4 i
    shift 4
    local ranks=("$@")
    for ((i = 0; i < count; i++)); do
        echo --adapter
        echo "$prefix$i=dummy:rank=${ranks[i % ${#ranks[@]}]},seed=$((first + i)),modules=$modules"
    done
}

# ------------------------------------------------------------------ stages

operations() {
    if [ -n "$emulate" ]; then "$build/tests/emulation/test_emulator"; else # the rest is ctest's own
        bench/gpu/smoke.sh; fi
}

greedy() {
    python3 bench/gpu/greedy.py "$lorad" cpu "$cuda_lorad" cuda ${emulate:+3}
}

roofline() {
    local model batches=1,16,32,64 prompts=512,2048 rank parts=()
    model=$(shape llama-2-7b 0)
    [ -z "$emulate" ] || batches=1,2 prompts=20
    for rank in "0" "64" "16 --modules qkvo" "16"; do # the last one's trace stays
        parts+=("$logs/roof-${rank// /}.json")
        roof "${parts[-1]}" --model "$model" --batch $batches --context 512 --rank $rank \
            --trace "$out/gpu-trace.json" || return 1
    done
    for rank in 0 16; do
        parts+=("$logs/roof-prefill-$rank.json")
        roof "${parts[-1]}" --model "$model" --batch $prompts --prefill --rank $rank || return 1
    done
    merge "$out/gpu-roofline.json" "${parts[@]}"
    echo "-- shrink beside the base matmul, rank 16; then without recordings"
    LORAD_CUDA_OVERLAP=1 roof "$logs/unused" --model "$model" --batch $batches --context 512 \
        --rank 16 | grep -E "^M|step" || return 1
    LORAD_CUDA_GRAPHS=0 roof "$logs/unused" --model "$model" --batch $batches --context 512 \
        --rank 16 | grep -E "^M|step"
}

# LoRA's kernels alone: batch by who shares an adapter by rank, on four layers of a 7B.
lora() {
    local model batches=1,8,32,64,256 sharing ranks parts=()
    model=$(shape llama-2-7b 4)
    [ -z "$emulate" ] || batches=1,3
    for sharing in distinct one power; do
        for ranks in 8 16 64 8,16,32,64; do
            parts+=("$logs/lora-$sharing-$ranks.json")
            roof "${parts[-1]}" --model "$model" --batch $batches --context 16 --lora-only \
                --rank $ranks --sharing $sharing || return 1
        done
    done
    merge "$out/gpu-lora.json" "${parts[@]}"
}

# S-LoRA's S1 (rank 8) and S2 (8 to 64) on q k v o of a 7B over the real server, every adapter having
# been used once, as S-LoRA has them all in host memory; then first uses of rank 16 on all modules.
serve() {
    local counts="5 100 1000 2000" mixed=400 cold=40 streams=16 model status=0 n parts=()
    local limits=(--max-step-tokens 2048 --max-seqs 256 --max-model-len 1024 --pool-bytes 48GiB
                  --host-bytes 80GiB --load-threads 12)
    [ -z "$emulate" ] || counts="2 5" mixed=2 cold=9 streams=1 limits=(--pool-bytes 2MiB --max-model-len 128)
    model=$(shape llama-2-7b 0)
    start "$model" "${limits[@]}" $(dummies host- 0 $cold all 16) $(dummies s1- 1000 ${counts##* } qkvo 8) \
        $(dummies s2- 9000 $mixed qkvo 8 16 32 64) $(dummies disk- 20000 $cold all 16) || return 1
    bench/gpu/first_token.py --url $url --touch host-
    bench/gpu/first_token.py --url $url --touch s1-
    for n in $counts; do
        echo "-- S1, $n adapters"
        parts+=("$logs/s1-$n.json")
        load "${parts[-1]}" --prefix s1- --adapters "$n" || status=1
    done
    echo "-- S2, $mixed adapters"
    bench/gpu/first_token.py --url $url --touch s2-
    parts+=("$logs/s2-$mixed.json")
    load "${parts[-1]}" --prefix s2- || status=1
    merge "$out/gpu-serving.json" "${parts[@]}"
    echo "-- first uses"
    for n in host- disk-; do
        bench/gpu/first_token.py --url $url --cold $n --decoding $streams \
            --commit "$commit" --json "$logs/first-$n.json" || status=1
    done
    merge "$out/gpu-first-token.json" "$logs"/first-*.json
    stop
    return $status
}

peers() {
    local args=(--device cuda)
    [ -z "$emulate" ] || args=(--device cpu --tiny)
    if ! python3 -c "import torch" 2>/dev/null; then
        echo "no torch: left out"
        return 0
    fi
    python3 bench/gpu/peers.py "${args[@]}" --commit "$commit" --json "$out/gpu-peers.json"
}

# A 13B: its step, and S-LoRA's S4 (ranks 16, 32, 64) with 100 adapters.
larger() {
    local batches=1,32 mixed=100 model status=0 parts=() rank
    local limits=(--max-step-tokens 2048 --max-seqs 128 --max-model-len 1024 --pool-bytes 40GiB
                  --host-bytes 40GiB --load-threads 12)
    [ -z "$emulate" ] || batches=1 mixed=2 limits=(--pool-bytes 2MiB --max-model-len 128)
    model=$(shape llama-2-13b 0)
    for rank in "0" "16" "16 --modules qkvo"; do
        parts+=("$logs/13b-${rank// /}.json")
        roof "${parts[-1]}" --model "$model" --batch $batches --context 512 --rank $rank || return 1
    done
    merge "$out/gpu-roofline.json" "${parts[@]}"
    start "$model" "${limits[@]}" $(dummies s4- 0 $mixed qkvo 16 32 64) || return 1
    bench/gpu/first_token.py --url $url --touch s4-
    load "$logs/s4.json" && merge "$out/gpu-serving.json" "$logs/s4.json" || status=1
    stop
    return $status
}

# Every kernel's addresses, on a tiny model in bf16, decodes and a prompt.
sanitize() {
    local tool=(compute-sanitizer --error-exitcode 1) model
    model=$(emulate=1 shape llama-2-7b 0)
    if [ -n "$emulate" ]; then tool=(); elif ! command -v compute-sanitizer >/dev/null; then
        echo "no compute-sanitizer: left out"
        return 0
    fi
    "${tool[@]}" "$rig" roofline --device cuda --peak-rows 16 --rounds 1 --model "$model" \
        --batch 1,3,17 --context 33 --rank 16,5 --sharing power || return 1
    "${tool[@]}" "$rig" roofline --device cuda --peak-rows 16 --rounds 1 --model "$model" \
        --batch 70 --prefill --rank 16
}

export -f shape merge roof start stop load dummies
export -f operations greedy roofline lora serve peers larger sanitize
export out logs emulate build lorad cuda_lorad bench rig commit device
stage operations 110
stage greedy 40
stage roofline 180
stage lora 60
stage serve 200
stage peers 70
stage larger 120
stage sanitize 40
echo >>"$summary"
[ ${#left_out[@]} = 0 ] || printf 'No time left for: %s. `STAGES="%s" bench/gpu/run.sh` goes on.\n\n' \
    "${left_out[*]}" "${left_out[*]}" >>"$summary"
python3 tools/figures.py --gpu "$out" >>"$summary" || failed=$((failed + 1))
cat "$summary"
exit $failed
