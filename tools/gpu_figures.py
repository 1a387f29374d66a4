"""Tables and plots of what a run of bench/gpu/run.sh left in a folder; part of figures.py."""
import json
import pathlib

from line_plot import line_plot

NOTHING = "**Nothing has been measured on a GPU yet.** No figure in this repository is a GPU's."


def load(folder, name):
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head, rows):
    """Numbers to the right, but for the first column."""
    return ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def share(step, *names):
    some = [o for n, o in step["operations"].items() if n.startswith(names)]
    spent = sum(o["seconds"] for o in some)
    return f"{sum(o['limit_seconds'] for o in some) / spent:.0%}" if spent else "-"


def adapters_of(result):
    if not result["rank"]:
        return "no adapters"
    modules = "q, k, v, o" if "qkvo" in result["command"] else "all seven modules"
    return f"each on its own rank-{result['rank']} adapter on {modules}"


def roofline(folder):
    lines = []
    for result in load(folder, "gpu-roofline.json") or []:
        limits = result["limits"]
        what = "one prompt of M tokens" if result["prefill"] else (
            f"M decodes, {result['context']} tokens of context each")
        lines += [f"**{pathlib.Path(result['model']).name}, {what}, {adapters_of(result)}** "
                  f"({result['machine']['device']}, commit `{result['commit'][:10]}`; "
                  f"{limits['read_bytes_per_s'] / 1e12:.2f} TB/s, bf16 "
                  f"{limits['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s in the same run)", ""]
        lines += table(
            ["M", "step, ms", "limit, ms", "share", "operations apart, ms", "base matmuls",
             "lora shrink", "lora expand", "attention"],
            [[s["tokens"], f"{s['step']['seconds'] * 1e3:.2f}",
              f"{s['step']['limit_seconds'] * 1e3:.2f}", f"{s['step']['share_of_limit']:.0%}",
              f"{s['operations_seconds'] * 1e3:.2f}", share(s, "linear"), share(s, "lora shrink"),
              share(s, "lora expand"), share(s, "attention")] for s in result["steps"]])
        copy = result.get("adapter_copy")
        if copy and copy["seconds"]:
            lines += [f"Such an adapter goes into its pages in {copy['seconds'] * 1e3:.2f} ms, "
                      f"{copy['bytes'] / copy['seconds'] / 1e9:.1f} GB/s.", ""]
    return lines


def trace(folder):
    """How long the device was idle between a step's operations."""
    result = load(folder, "gpu-trace.json")
    if not result:
        return []
    events = result["traceEvents"]
    rows = []
    for process in (e for e in events if e["name"] == "process_name"):
        lane = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (process["pid"], 2)]
        if not lane:
            continue
        busy = sum(e["dur"] for e in lane)
        whole = lane[-1]["ts"] + lane[-1]["dur"] - lane[0]["ts"]
        gap, after = max((b["ts"] - a["ts"] - a["dur"], a["name"]) for a, b in zip(lane, lane[1:]))
        rows.append([process["args"]["name"], len(lane), f"{whole / 1e3:.2f}", f"{busy / whole:.1%}",
                     f"{gap:.1f} us, after {after}"])
    return ["**One step by device marks** (`gpu-trace.json` is for chrome://tracing or Perfetto)", "",
            *table(["step", "operations", "ms", "device busy", "longest gap"], rows)]


def lora(folder):
    runs = load(folder, "gpu-lora.json")
    if not runs:
        return []
    batches = [step["tokens"] for step in runs[0]["steps"]]
    return ["**LoRA's kernels, share of max(bytes / bandwidth, flops / peak): shrink, expand**", "",
            *table(["adapters", "rank", *(f"batch {b}" for b in batches)],
                   [[run["sharing"], ", ".join(map(str, run["ranks"])),
                     *(f"{share(step, 'lora shrink')}, {share(step, 'lora expand')}"
                       for step in run["steps"])] for run in runs])]


def workload(run):
    """The prefix that its adapters' ids share says which."""
    return run["by_adapter"][0]["name"].split("-")[0].upper()


def serving(folder):
    rows = []
    for run in load(folder, "gpu-serving.json") or []:
        f, load_ = run["figures"], run["workload"]
        rows.append([f"{workload(run)}, {run['model']}", run["adapters"], load_["concurrency"],
                     f"{f['requests_per_s']:.2f}", f"{f['output_tokens_per_s']:.0f}",
                     f"{f['ttft_s']['p50']:.2f} / {f['ttft_s']['p99']:.2f}",
                     f"{f['itl_s']['p99'] * 1e3:.0f}", f["failed"]])
    return rows and ["**The server under S-LoRA's workloads, a closed loop**", "",
                     *table(["workload", "adapters", "at once", "req/s", "output tok/s",
                             "first token, p50 / p99 s", "gap p99, ms", "failed"], rows)]


def first_token(folder):
    rows = [[row["tier"], row["decoding"], row["adapters"], f"{row['resident_s'] * 1e3:.1f}",
             f"{row['cold_s'] * 1e3:.1f}", f"{row['added_s'] * 1e3:+.1f}"]
            for run in load(folder, "gpu-first-token.json") or [] for row in run["rows"]]
    return rows and ["**First token of an adapter's first use** (dummy adapters \"on disk\" are computed, "
                     "not read)", "",
                     *table(["adapter in", "streams beside", "adapters", "resident, ms", "cold, ms",
                             "added, median ms"], rows)]


def peers(folder):
    result = load(folder, "gpu-peers.json")
    if not result:
        return []
    lines = [f"**torch {result['torch']} on the same device**", ""]
    peft = result["peft"]
    if "left_out" in peft:
        lines += [f"transformers + PEFT left out: {peft['left_out']}", ""]
    else:
        lines += table([f"transformers + PEFT, {peft['batch']} requests in one batch", "output tok/s",
                        "decode step, ms"],
                       [[what, f"{peft[what]['output_tokens_per_s']:.0f}",
                         f"{peft[what]['decode_step_s'] * 1e3:.1f}"]
                        for what in ("base", "distinct adapters")])
    limits = result["limits"]
    if "left_out" in limits:
        return lines
    read = limits["copy_bytes_per_s"]
    lines += [f"Device copy {read / 1e12:.2f} TB/s; page-locked memory to the device "
              f"{limits['host_to_device_bytes_per_s'] / 1e9:.1f} GB/s, back "
              f"{limits['device_to_host_bytes_per_s'] / 1e9:.1f} GB/s; bf16 matmul "
              f"{limits['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s.", ""]
    for part, name, key in (("base_matmuls", "base matmuls", "weight_bytes_per_s"),
                            ("attention", "attention", "kv_bytes_per_s"),
                            ("lora_bmm", "LoRA by batched matmuls", "adapter_bytes_per_s")):
        if "left_out" in result[part]:
            continue
        lines += table([f"{name}, share of copy bandwidth", ""],
                       [[", ".join(f"{k} {v}" for k, v in row.items()
                                   if k in ("matmul", "rank", "rows")), f"{row[key] / read:.0%}"]
                        for row in result[part]])
    return lines


def text(folder):
    lines = [line for part in (roofline, trace, lora, serving, first_token, peers)
             for line in part(folder)]
    return "\n".join(lines).rstrip() if lines else NOTHING


def plots(folder):
    """{file name: SVG} of what the folder has."""
    made = {}
    runs = [r for r in load(folder, "gpu-serving.json") or [] if workload(r) == "S1"]
    if len(runs) > 1:
        made["gpu-adapters.svg"] = line_plot(
            "S1: output tokens a second", "adapters",
            {runs[0]["model"]: [(r["adapters"], r["figures"]["output_tokens_per_s"]) for r in runs]},
            evenly=True)
    everything = load(folder, "gpu-serving.json") or []
    if everything:
        made["gpu-latency.svg"] = line_plot(
            "first tokens within so many seconds, %", "seconds",
            {f"{workload(r)}, {r['adapters']} adapters":
             [(0, 0), *((s, p + 1) for p, s in enumerate(r["percentiles"]["ttft_s"]))]
             for r in everything})
    kernels = [r for r in load(folder, "gpu-lora.json") or [] if r["sharing"] == "distinct"]
    if kernels:
        made["gpu-lora.svg"] = line_plot(
            "LoRA's kernels, all distinct: % of the limit", "batch",
            {f"{what}, rank {','.join(map(str, r['ranks']))}":
             [(s["tokens"], 100 * s["operations"][f"lora {what}"]["share_of_limit"])
              for s in r["steps"]] for r in kernels for what in ("shrink", "expand")}, evenly=True)
    return made
