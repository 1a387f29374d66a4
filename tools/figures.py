#!/usr/bin/env python3
"""Writes the figures of README.md and docs/*.md from the JSON files in bench/results.

    tools/figures.py           rewrites what stands between the markers
    tools/figures.py --check   exits 1 when a document does not say what the results say
    tools/figures.py --gpu DIR prints what a run of bench/gpu/run.sh left in DIR, and draws it there

A marker is `<!-- figures NAME -->` ... `<!-- end -->`; NAME is a function of this file. No figure in
these documents is written by hand.
"""
import json
import pathlib
import re
import statistics
import sys

import gpu_figures

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def load(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def spread(values, form="{:.0f}"):
    values = sorted(values)
    return " / ".join(form.format(v) for v in (values[0], values[len(values) // 2], values[-1]))


def source(name, result):
    machine = result["machine"]
    return (f"`bench/results/{name}`: {machine['cpu']}, {machine.get('cores', machine.get('threads'))}"
            f" cores, commit `{result['commit'][:10]}`, `{result['command']}`")


def many_adapters():
    name = "cpu-16-adapters.json"
    result = load(name)
    rows = result["rounds"]

    def side(key, field):
        return [r[key][field] for r in rows]
    ratios = [a / b for a, b in zip(side("together", "output_tokens_per_s"),
                                    side("one_after_another", "output_tokens_per_s"))]
    return "\n".join([
        "| minimum / median / maximum of %d alternations | output tok/s | mean TTFT, s |" % len(rows),
        "|---|---:|---:|",
        f"| 16 requests on 16 distinct rank-16 adapters, at once | "
        f"{spread(side('together', 'output_tokens_per_s'))} | "
        f"{spread(side('together', 'ttft_mean_s'), '{:.2f}')} |",
        f"| the same 16, one after another | {spread(side('one_after_another', 'output_tokens_per_s'))}"
        f" | {spread(side('one_after_another', 'ttft_mean_s'), '{:.2f}')} |",
        f"| ratio | {spread(ratios, '{:.1f}')} | |",
        "", "TinyLlama-1.1B shape, random weights, bf16, prompts of 32, outputs of 48 tokens. From",
        source(name, result) + "."])


def roofline():
    parts = []
    for name in sorted(p.name for p in RESULTS.glob("cpu-roofline*.json")):
        result = load(name)
        limits = result["limits"]
        what = "one prompt of M tokens" if result["prefill"] else (
            f"M sequences, {result['context']} tokens of context each" +
            (f", each on its own rank-{result['rank']} adapter" if result["rank"] else ""))
        if result.get("quantization", "none") != "none":
            what += f", weights in {result['quantization']}"
        parts += [f"**{what}**", "", "| M | step, ms | limit, ms | share | where the rest goes |",
                  "|---:|---:|---:|---:|---|"]
        for step in result["steps"]:
            total = step["step"]
            over = {k: v["seconds"] - v["limit_seconds"] for k, v in step["operations"].items()}
            worst = sorted(over, key=over.get, reverse=True)[:3]
            rest = ", ".join(f"{k} {over[k] * 1e3:+.1f} ms" for k in worst if over[k] > 0)
            parts.append(f"| {step['tokens']} | {total['seconds'] * 1e3:.1f} | "
                         f"{total['limit_seconds'] * 1e3:.1f} | {total['share_of_limit']:.0%} | {rest} |")
        parts += ["", f"Measured in the same run: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, "
                  f"bf16 {limits['bf16_flops_per_s'] / 1e9:.0f} GFLOP/s, f32 "
                  f"{limits['f32_flops_per_s'] / 1e9:.0f} GFLOP/s.", source(name, result) + ".", ""]
    return "\n".join(parts).rstrip()


def slora_rows():
    rows = ["| | n | req/s offered, s | req/s publ. | sim. | off | first token s publ. | sim. | "
            "latency s publ. | sim. | off | in 6 s publ. | sim. | ours: req/s | first token s | in 6 s |",
            "|" + "---|" * 16]
    fitted_by_latency = True  # the first fitted row is fitted by its latency, the others by throughput
    for row in load("sim-slora-a100.json")["rows"]:
        p, s, o = row["published"], row["slora_policy"], row["lorad_policy"]
        rate_star = latency_star = ""
        if row["fitted"]:
            rate_star, latency_star = ("", "*") if fitted_by_latency else ("*", "")
            fitted_by_latency = False
        rows.append(
            f"| {row['workload']} | {row['adapters']} | {row['rate']:.0f}, {row['duration_s']:.0f} | "
            f"{p['requests_per_s']:.2f} | {s['requests_per_s']:.2f} | "
            f"{s['requests_per_s'] / p['requests_per_s'] - 1:+.1%}{rate_star} | "
            f"{p['ttft_mean_s']:.2f} | {s['ttft_mean_s']:.2f} | {p['latency_mean_s']:.1f} | "
            f"{s['latency_mean_s']:.1f} | {s['latency_mean_s'] / p['latency_mean_s'] - 1:+.1%}"
            f"{latency_star} | {p['slo_attained']:.0%} | {s['slo_attained']:.0%} | "
            f"{o['requests_per_s']:.2f} | {o['ttft_mean_s']:.2f} | {o['slo_attained']:.0%} |")
    return "\n".join(rows)


def eviction():
    rows = ["| trace | eviction | found resident | GB copied | first token s, mean | p99 | req/s |",
            "|---|---|---:|---:|---:|---:|---:|"]
    for r in load("sim-eviction.json")["rows"]:
        rows.append(f"| {r['trace_name']} | {r['eviction']} | {r['adapter_hit_rate']:.1%} | "
                    f"{r['bytes_moved'] / 1e9:.1f} | {r['ttft_s']['mean']:.3f} | "
                    f"{r['ttft_s']['p99']:.3f} | {r['requests_per_s']:.2f} |")
    return "\n".join(rows)


def cold_adapters():
    name = "cpu-10000-adapters.json"
    result = load(name)

    def side(runs, key, field, scale=1, form="{:.0f}"):
        return spread([r[key][field] * scale for r in runs], form)

    def pair(what, part):
        runs = part["runs"]
        return (f"| {what} | {side(runs, 'few', 'output_tokens_per_s')} | "
                f"{side(runs, 'many', 'output_tokens_per_s')} | "
                f"{spread([r['many']['output_tokens_per_s'] / r['few']['output_tokens_per_s'] for r in runs], '{:.3f}')} | "
                f"{by_bytes(part)} | {side(runs, 'many', 'reads')} |")

    def by_bytes(part):
        share = part.get("ratio_by_bytes")
        return " / ".join(f"{share[k]:.3f}" for k in ("min", "median", "max")) if share else ""
    fit, thrash, calm = result["fit"], result["thrash"], result["calm"]["runs"]
    lines = ["| minimum / median / maximum of %d rounds | 5 adapters, tok/s | 10,000, tok/s | ratio | "
             "ratio by bytes | adapters read |" % len(thrash["runs"]), "|---|---:|---:|---:|---:|---:|",
             pair("all of them fit; at 0.6 of the rate that saturates", fit["open"]),
             pair("all of them fit; 8 requests at once", fit["closed"]),
             pair("room for a tenth; 8 requests at once", thrash), "",
             "| a stream on a resident adapter | gap p50, ms | p99, ms |", "|---|---:|---:|"]
    for key, what in (("alone", "alone"),
                      ("prefetch", "while 100 unused adapters are prefetched"),
                      ("resident_requests", "while 100 short requests on resident adapters come in"),
                      ("cold_requests", "while 100 short requests on cold adapters come in")):
        lines.append(f"| {what} | {side(calm, key, 'p50_s', 1e3, '{:.1f}')} | "
                     f"{side(calm, key, 'p99_s', 1e3, '{:.1f}')} |")
    registered = result["registered"]
    lines += ["", f"10,000 registered (9,000 seeded, 1,000 folders), serving after "
              f"{registered['start_s']:.1f} s. A first token waits {thrash['cold_read_s'] * 1e3:.0f} ms "
              "longer when its adapter comes from disk and nothing else runs. " + result["what"] +
              ". From",
              source(name, result) + "."]
    return "\n".join(lines)


def compare():
    name = "cpu-compare.json"
    if not (RESULTS / name).exists():
        return "Not measured yet."
    result = load(name)
    limits = result["limits"]
    return ((RESULTS / "cpu-compare.md").read_text(encoding="utf-8").rstrip() +
            f"\n\nMeasured in the same run: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 "
            f"{limits['bf16_flops_per_s'] / 1e9:.0f} GFLOP/s. TinyLlama-1.1B shape, random weights, bf16, "
            "prompts of 32, outputs of 48 tokens. From\n" + source(name, result) + ".")


def compare_short():
    name = "cpu-compare.json"
    result = load(name)
    table = result["table"]
    rows = {"decode 1": "one request, tok/s after the first token", "base 16": "16 requests, base, tok/s",
            "adapters 16": "16 requests on 16 distinct rank-16 adapters, tok/s",
            "prefill 512": "a prompt of 512, tok/s"}
    others = [engine for engine in ("llama.cpp", "vLLM (CPU)", "transformers + PEFT") if engine in table]
    lines = ["| median (lorad over the other) | lorad | " + " | ".join(others) + " |",
             "|---|---:" + "|---:" * len(others) + "|"]
    for key, what in rows.items():
        cells = [f"{table['lorad'][key]['median']:.0f}"]
        for engine in others:
            ratio = table[engine]["lorad is faster by"][key]["median"]
            cells.append(f"{table[engine][key]['median']:.0f} ({ratio:.1f} x)")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["", f"TinyLlama-1.1B shape, random weights, bf16, prompts of 32, outputs of "
                              "48 tokens; transformers + PEFT is one static batch, not a server. From",
                              source(name, result) + "."])


def file_read():
    name = "cpu-file-read.json"
    result = load(name)
    lines = ["| | page cache, MB/s | from disk, MB/s |", "|---|---:|---:|"]
    for how in dict.fromkeys(row["how"] for row in result["rows"]):
        at = {row["where"]: row["mb_per_s"] for row in result["rows"] if row["how"] == how}
        lines.append(f"| {how} | {at['page cache']:,.0f} | {at['from disk']:,.0f} |")
    return "\n".join(lines + ["", result["what"] + ". From", source(name, result) + "."])


def perplexity():
    name = "cpu-perplexity.json"
    result = load(name)
    lines = ["| weights | perplexity | against f32 |", "|---|---:|---:|"]
    for row in result["rows"]:
        kind = row["dtype"] if row["quantization"] == "none" else row["quantization"]
        lines.append(f"| {kind} | {row['perplexity']:.3f} | {row['against_first']:+.2%} |")
    return "\n".join(lines + ["", f"{result['tokens']} tokens of text that the demo model was not "
                              "trained on. From", source(name, result) + "."])


def speculation():
    name = "cpu-speculation.json"
    result = load(name)
    lines = ["| text | off, tok/s | auto, tok/s | ratio | drafts right |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        off, auto = row["off"], row["auto"]
        right = sum(r["accepted"] for r in auto) / max(1, sum(r["drafts"] for r in auto))
        ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(off, auto)]
        lines.append(f"| {row['text']} | {spread([r['tokens_per_s'] for r in off])} | "
                     f"{spread([r['tokens_per_s'] for r in auto])} | {spread(ratios, '{:.2f}')} | "
                     f"{right:.0%} |")
    return "\n".join(lines + ["", result["what"] + ". From", source(name, result) + "."])


def before_after():
    name = "cpu-before-after.json"
    result = load(name)
    columns = {"decode 1": "1 sequence", "decode 16": "16", "lora 16": "of these LoRA",
               "decode 64": "64", "prompt 512": "a prompt of 512"}
    lines = ["| milliseconds a step, minimum / median | " + " | ".join(columns.values()) + " |",
             "|---" + "|---:" * len(columns) + "|"]
    for row in result["rows"]:
        cells = " | ".join("{min:.0f} / {median:.0f}".format(**row["ms"][key]) for key in columns)
        commit = result["commit"][:7] if row["commit"] == "HEAD" else row["commit"]
        lines.append(f"| `{commit}` {row['what']} | {cells} |")
    return "\n".join(lines + ["", f"{result['rounds']} rounds. From", source(name, result) + "."])


def compact():
    name = "cpu-compact.json"
    result = load(name)
    lines = ["| milliseconds a step, minimum / median / maximum | 1 sequence | 16 | 64 | "
             "a prompt of 512 |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        cells = " | ".join(f"{min(v):.0f} / {statistics.median(v):.0f} / {max(v):.0f}"
                           for v in row["step_ms"].values())
        lines.append(f"| {row['what']} (`{row['isa']}`, `{row['linear']}`) | {cells} |")
    return "\n".join(lines + ["", "Three alternations; a sequence has its own rank-16 adapter. From",
                              source(name, result) + "."])


def footprint():
    name = "cpu-footprint.json"
    result = load(name)
    base, first = result["base_with_10000_registered"], result["first_token_s"]
    chance = result["another_with_none"]
    other = spread([s["other_bytes"] / 2**20 for s in result["starts"]])
    return (f"From start to first token, 1.1B in bf16 from the page cache: {first['min']:.1f} / "
            f"{first['median']:.1f} / {first['max']:.1f} s. Resident beside weights and pool: {other} MiB. "
            f"The base model with 10,000 idle adapters registered against none: {base['min']:.3f} / "
            f"{base['median']:.3f} / {base['max']:.3f} times the tokens a second; a second server "
            f"with none against the first: {chance['min']:.3f} / {chance['median']:.3f} / "
            f"{chance['max']:.3f}. From\n"
            + source(name, result) + ".")


def fairness():
    result = load("cpu-fairness.json")
    flood, polite = result["service"]["flood"], result["service"]["polite"]
    return (f"A tenant with {result['inside']['flood']} requests inside and one with "
            f"{result['inside']['polite']} got {flood:.0f} and {polite:.0f} weighted tokens in "
            f"38 s; over that time their difference moved by {result['drift']:.0f}; the paper's bound "
            f"is {result['bound']:.0f}. From `bench/results/cpu-fairness.json` (plot beside it), commit "
            f"`{result['commit'][:10]}`, `{result['command']}`.")


def gpu():
    plots = [f"![](../bench/results/{name})" for name in gpu_figures.plots(RESULTS)]
    return "\n\n".join([gpu_figures.text(RESULTS), *plots])


def rewrite(text):
    def block(match):
        return f"{match.group(1)}\n{globals()[match.group(2)]()}\n<!-- end -->"
    return re.sub(r"(<!-- figures (\w+) -->)\n.*?<!-- end -->", block, text, flags=re.S)


def main():
    if sys.argv[1:2] == ["--gpu"]:
        folder = pathlib.Path(sys.argv[2])
        print(gpu_figures.text(folder))
        for name, svg in gpu_figures.plots(folder).items():
            (folder / name).write_text(svg, encoding="utf-8")
        return
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = rewrite(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print("not what bench/results says (run tools/figures.py):", ", ".join(stale))
        sys.exit(1)


if __name__ == "__main__":
    main()
