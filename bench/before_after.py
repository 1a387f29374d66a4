#!/usr/bin/env python3
"""A step's time at earlier commits and now, on the same machine, in alternation.

    python3 bench/before_after.py [--rounds 3] [--out bench/results/cpu-before-after.json]

Each commit is checked out beside the sources, its lorad-bench built, and `lorad-bench roofline` run: 1,
16 and 64 sequences, each on its own rank-16 adapter, and one prompt of 512 tokens, in bf16 on the
TinyLlama-1.1B shape. Figures are milliseconds a step: the rounds' minimum, median and maximum.
"""
import argparse
import pathlib
import re
import subprocess
import tempfile

from record import save, spread

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMITS = {
    "637ac90": "first measured",
    "fcd7f84": "LoRA reads A and B as they lie; one walk over panels",
    "db67c7e": "weights in 12 bits, in the order in which they are read",
    "ded6214": "tiles for pairs of bf16, KV as attention reads it, FFN in blocks",
    "HEAD": "shares of threads, one call for all groups of rows",
}
RUNS = {"decode": ("--batch", "1,16,64", "--rank", "16"), "prompt": ("--batch", "512", "--prefill")}


def build(commit, folder):
    """The commit's lorad-bench."""
    tree = folder / commit
    for command in (["git", "worktree", "add", "--detach", tree, commit],
                    ["cmake", "-S", tree, "-B", tree / "build", "-G", "Ninja", "-DLORAD_CUDA=OFF"],
                    ["ninja", "-C", tree / "build", "lorad-bench"]):
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return tree / "build" / "lorad-bench"


def measure(bench):
    """Milliseconds of each step, and what LoRA takes of the one of 16 sequences."""
    found = {}
    for run, options in RUNS.items():
        text = subprocess.run([bench, "roofline", "--model", ROOT / "bench/models/tinyllama-1.1b",
                               "--dtype", "bf16", "--rounds", "5", *options],
                              check=True, capture_output=True, text=True).stdout
        for rows, table in re.findall(r"M = (\d+)\n(.*?)(?=\nM = |\Z)", text, re.S):
            took = {name: float(ms) for name, ms in re.findall(r"^ +(\S.*?) {2,}([\d.]+)", table, re.M)}
            found[f"{run} {rows}"] = took["step"]
            if rows == "16":
                found["lora 16"] = took["lora shrink"] + took["lora expand"]
    return found


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", default=str(ROOT / "bench/results/cpu-before-after.json"))
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benches = {commit: build(commit, pathlib.Path(folder)) for commit in COMMITS}
        rounds = {commit: [] for commit in COMMITS}
        for number in range(options.rounds):  # turned round each time
            for commit in list(COMMITS)[::-1 if number % 2 else 1]:
                rounds[commit].append(measure(benches[commit]))
                print(number, commit, rounds[commit][-1], flush=True)
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    rows = [{"commit": commit, "what": what,
             "ms": {key: spread([r[key] for r in rounds[commit]]) for key in rounds[commit][0]}}
            for commit, what in COMMITS.items()]
    save(options.out, "milliseconds a step at earlier commits and now",
         "python3 bench/before_after.py", {"rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
