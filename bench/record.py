"""What every result in bench/results says beside its figures: where, when, of which commit, by which
command; and how runs are summed up."""
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess

HERE = pathlib.Path(__file__).resolve().parent


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def machine(**more):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if "model name" in line),
                   platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), **more}


def save(path, what, command, figures, **more):
    """Writes and returns the result; `more` describes the machine."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True,
                            text=True).stdout.strip()
    result = {"what": what, "command": command, "date": datetime.date.today().isoformat(),
              "commit": commit, "machine": machine(**more), **figures}
    pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
    return result
