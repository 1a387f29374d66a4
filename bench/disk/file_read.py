#!/usr/bin/env python3
"""Builds file_read.c, runs it in a temporary folder and keeps what it says. Needs liburing-dev.

    python3 bench/disk/file_read.py [--out bench/results/cpu-file-read.json]
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import save  # noqa: E402


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", default=str(HERE.parent / "results" / "cpu-file-read.json"))
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/file_read"
        subprocess.run(["cc", "-O2", HERE / "file_read.c", "-luring", "-lpthread", "-o", program],
                       check=True)
        said = subprocess.run([program, folder], check=True, capture_output=True, text=True).stdout
    print(said, end="")
    rows = [{"how": line[:24].strip(), "where": line[25:37].strip(), "mb_per_s": float(line.split()[-2])}
            for line in said.splitlines()]
    save(options.out, "96 files of 9 MB, best of three", "python3 bench/disk/file_read.py",
         {"rows": rows})


if __name__ == "__main__":
    main()
