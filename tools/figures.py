#!/usr/bin/env python3
"""Writes the figures of README.md and docs/performance.md from the JSON files in bench/results.

    tools/figures.py           rewrites what stands between the markers
    tools/figures.py --check   exits 1 when a document does not say what the results say

A marker is `<!-- figures NAME -->` ... `<!-- end -->`; NAME is a function of this file. No figure in
these documents is written by hand.
"""
import json
import pathlib
import re
import sys

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


def rewrite(text):
    def block(match):
        return f"{match.group(1)}\n{globals()[match.group(2)]()}\n<!-- end -->"
    return re.sub(r"(<!-- figures (\w+) -->)\n.*?<!-- end -->", block, text, flags=re.S)


def main():
    stale = []
    for path in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        if not path.exists():
            continue
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
