#!/usr/bin/env python3
"""Instruction counts of what is hot, against bench/baseline.json.

    make bench-check             compares; exits 1 when a count moved by more than 3%
    bench/check.py --update      writes the baseline; the commit that does so says why it moved

Counted by valgrind's callgrind in single-threaded, seeded programs, so that the counts are the same
on every run whatever else the machine does: the CPU backend's operation tests on the AVX2 kernels
(valgrind knows no AVX-512), and the simulator and the engine's own tests for what the server adds to
a step. Counts belong to one compiler and one C library; another's are told apart by the baseline's
"built with".
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASELINE = ROOT / "bench" / "baseline.json"
PROGRAMS = {
    "tests/test_backend_cpu": ["cpu_linear", "cpu_lora_shrink", "cpu_lora_expand", "cpu_attention",
                               "cpu_rms_norm", "cpu_rope_and_kv_write", "cpu_silu_mul"],
    "tests/test_quant": ["cpu_quant_linear"],
    "tests/test_scheduler": ["sched_plan"],
    "tests/test_tenants": ["tenants_window", "tenants_wait"],
    "tests/test_sampler": ["sampler_sample"],
    "tests/test_prefix": ["prefix_match", "prefix_add", "prefix_leave"],
    "tests/test_residency": ["residency_place", "eviction_reclaim"],
}
MOVED = 0.03


def count(build, program, functions):
    """Inclusive instructions of each function over the whole program."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/callgrind.out"
        subprocess.run(["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "-q",
                        str(build / program)], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL,
                       env={**os.environ, "LORAD_TEST_SETUP": "avx2"})
        text = subprocess.run(["callgrind_annotate", "--inclusive=yes", "--threshold=100", out],
                              check=True, capture_output=True, text=True).stdout
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*([\d,]+) \(.*?\)\s+\S*:(\w+)", line)
        if match and match.group(2) in functions:
            found[match.group(2)] = max(found.get(match.group(2), 0),
                                        int(match.group(1).replace(",", "")))
    return found


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    options.add_argument("--update", action="store_true")
    options = options.parse_args()
    if not shutil.which("valgrind"):
        print("bench-check: valgrind is not installed")
        return 2
    built = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    counts = {}
    for program, functions in PROGRAMS.items():
        found = count(options.build, program, functions)
        for name in functions:
            if name not in found:
                print(f"bench-check: {name} was not called in {program}")
                return 1
        counts[program] = found
        print(program, json.dumps(found), flush=True)
    if options.update:
        BASELINE.write_text(json.dumps({"built with": built, "instructions": counts}, indent=1) + "\n")
        return 0
    baseline = json.loads(BASELINE.read_text())
    if baseline["built with"] != built:
        print(f"bench-check: the baseline is of {baseline['built with']}, this is {built}")
        return 0
    moved = 0
    for program, functions in baseline["instructions"].items():
        for name, before in functions.items():
            change = counts[program][name] / before - 1
            if abs(change) > MOVED:
                moved += 1
                print(f"{name}: {before} -> {counts[program][name]} ({change:+.1%})")
    print(f"bench-check: {moved} moved by more than {MOVED:.0%}")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
