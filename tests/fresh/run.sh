#!/bin/bash
# What a newcomer meets: a bare Debian 12 with only git and make, a clone, `make serve`, and two
# requests for two adapters at the same moment. Prints the answers and what /metrics says of them.
# Not part of `make test`: it needs root, debootstrap, curl and a Debian mirror, and some minutes.
#
#   tests/fresh/run.sh                 the committed HEAD of this repository
#   FULL=1 tests/fresh/run.sh          then also `make test` in the same root
#   BUILD_ONLY=1 tests/fresh/run.sh    `make build` (with FULL `make test`); starts no server
#   KEEP=1                             leaves the root behind and prints where
# PORT, PROMPT and WAIT_S (for each of the long steps) may be set. The mirror is the one that the
# host's own apt sources name. Packages and everything else are installed by `make` itself.
set -euo pipefail

repository=$(cd "$(dirname "$0")/../.." && pwd)
port=${PORT:-18000}
prompt=${PROMPT:-Hello}
wait_s=${WAIT_S:-1800}
work=$(mktemp -d /var/tmp/lorad-fresh-XXXXXX)
root=$work/root
server=""

finish() {
    local status=$?
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true # unshare ignores TERM; its children die with it
        wait "$server" 2>/dev/null || true
    fi
    if [ -n "${KEEP:-}" ]; then
        echo "kept: $work"
    else
        rm -rf --one-file-system "$work"
    fi
    [ $status -eq 0 ] || echo "FAILED"
    exit $status
}
trap finish EXIT

step() {
    echo "== $* (${SECONDS}s)"
}

# Runs a command in the clone inside the root, with its own processes: they all end with it.
in_root() {
    local pass=() name
    for name in $(compgen -e); do
        case $name in PIP_* | http_proxy | https_proxy | no_proxy) pass+=("$name=${!name}") ;; esac
    done
    exec unshare --mount --pid --fork --kill-child --mount-proc="$root/proc" \
        chroot "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME=/root LANG=C.UTF-8 "${pass[@]}" sh -c 'cd /root/lorad && exec "$@"' sh "$@"
}

copy_into_root() {
    local file
    for file in "$@"; do
        [ -f "$file" ] && install -D -m 644 "$file" "$root$file"
    done
    return 0
}

make_root() {
    local mirror
    mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' \
        'Created-By: Packages' | awk '$1 == "bookworm" && $2 == "main" { print $3; exit }')
    if [ -z "$mirror" ]; then
        echo "no apt source of this machine offers bookworm main" >&2
        exit 1
    fi
    timeout "$wait_s" debootstrap --variant=minbase --include=git,make,ca-certificates \
        bookworm "$root" "$mirror" >"$work/debootstrap.log" 2>&1 ||
        { tail -n 20 "$work/debootstrap.log" && exit 1; }
    # How this machine reaches its package sources is the machine's business, not lorad's.
    copy_into_root /etc/resolv.conf /etc/hosts /etc/apt/apt.conf /etc/pip.conf \
        "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf" ${PIP_CERT:+"$PIP_CERT"} \
        $(sed -n 's/^ *cert *= *//p' /etc/pip.conf 2>/dev/null)
    timeout 300 git clone -q --no-hardlinks "$repository" "$root/root/lorad"
}

# Reads the server's output until it says that it listens.
await_listening() {
    local line deadline=$((SECONDS + wait_s))
    while [ $SECONDS -lt $deadline ] && IFS= read -r -t $((deadline - SECONDS)) line <&3; do
        printf '%s\n' "$line" >>"$work/serve.log"
        case $line in *"listening on "*) return 0 ;; esac
    done
    echo "the server did not come up; its last lines:"
    tail -n 30 "$work/serve.log"
    return 1
}

complete() {
    printf '{"model":"%s","prompt":"%s","max_tokens":32,"temperature":0}' "$1" "$prompt" |
        curl -sS --max-time 300 -H 'Content-Type: application/json' --data-binary @- \
            "http://127.0.0.1:$port/v1/completions"
}

ask_two_adapters() {
    local models first second
    models=$(curl -sS --max-time 60 "http://127.0.0.1:$port/v1/models")
    { read -r _ && read -r first && read -r second; } \
        < <(grep -oE '"id": ?"[^"]*"' <<<"$models" | sed -E 's/.*"([^"]*)"$/\1/') ||
        { echo "fewer than two adapters: $models" && return 1; }
    complete "$first" >"$work/first" &
    local other=$!
    complete "$second" >"$work/second"
    wait $other
    printf '%s: %s\n' "$first" "$(cat "$work/first")" "$second" "$(cat "$work/second")"
    grep -q '"choices"' "$work/first" && grep -q '"choices"' "$work/second" ||
        { echo "an answer has no choices" && return 1; }
    curl -sS --max-time 60 "http://127.0.0.1:$port/metrics" |
        grep -E '^(vllm:lora_requests_info|lorad_step_adapters)'
}

[ "$(id -u)" -eq 0 ] || { echo "tests/fresh/run.sh makes a Debian root and so needs root" >&2; exit 1; }
step "a bare Debian 12 root"
make_root
full_tests() {
    [ -n "${FULL:-}" ] || return 0
    step "make test"
    (in_root timeout "$wait_s" make test) 2>&1 | tail -n 12
}

if [ -n "${BUILD_ONLY:-}" ]; then
    step "make build"
    (in_root timeout "$wait_s" make build) 2>&1 | tail -n 5
    full_tests
    step "done"
    exit 0
fi
step "make serve"
mkfifo "$work/output"
(in_root make serve "PORT=$port") >"$work/output" 2>&1 &
server=$!
exec 3<"$work/output"
await_listening
cat <&3 >>"$work/serve.log" &
step "two adapters at the same moment"
ask_two_adapters
full_tests
step "done"
