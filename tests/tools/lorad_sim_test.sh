#!/bin/sh
# The command lorad-sim: what it refuses, with which words; that --help and a run work. $1: program.
set -eu
sim=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# ARGUMENTS | WHAT stderr MUST SAY; the exit status must be 2
while IFS='|' read -r arguments says; do
    status=0
    # shellcheck disable=SC2086
    "$sim" $arguments >"$work/out" 2>"$work/err" || status=$?
    if [ "$status" -ne 2 ] || ! grep -qF -- "$says" "$work/err"; then
        echo "lorad-sim $arguments: status $status, $(cat "$work/err")"
        failed=1
    fi
done <<'CASES'
--workload S3|--workload S3: not a value
--device a10g|--device a10g: not a value
--adapters -1|--adapters -1: not a value
--adapters 5x|--adapters 5x: not a value
--rate 0|--rate 0: not a value
--rate nan|--rate nan: not a value
--input 8|--input 8: not a value
--input 512,8|--input 512,8: not a value
--ranks 8,0|--ranks 8,0: not a value
--ranks 1,2,3,4,5,6,7,8,9|not a value
--max-seqs 0|--max-seqs 0: not a value
--reproduce vllm|--reproduce vllm: not a value
--policy slora --load async|--load async is lorad's alone
--model llama-13b --device cpu|no memory is left for a pool
--pool-tokens 100|more than the pool's
--duration 0.01 --rate 1|must give a request
--json /nonexistent/x --duration 1|cannot open /nonexistent/x
--no-such-option|see lorad-sim --help
words|words: not an option
CASES
"$sim" --help | grep -qF -- --reproduce || failed=1
"$sim" --adapters 100000 --duration 60 --json "$work/r" --csv "$work/c" --svg "$work/s" >"$work/out"
grep -q 'simulation: llama-7b on a100-80g, policy lorad' "$work/out" || failed=1
head -1 "$work/c" | grep -qx 'time_s,free,kv,adapter,cached,running,waiting' || failed=1
grep -q '</svg>' "$work/s" || failed=1
exit $failed
