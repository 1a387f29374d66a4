#!/usr/bin/env python3
"""lorad against what else serves adapters on this machine, in alternation.

    make compare            installs what it can, makes the model, runs this
    bench/compare/compare.py --folder DIR [--rounds 3] [--out bench/results/cpu-compare]

A TinyLlama-1.1B shape in bf16, and rounded to 8 bits, the same random weights for everybody; prompts
of 32 tokens, 48 tokens out, greedy, end of text ignored. In every round each engine is started,
asked and stopped before the next one, so that no two share the processor:

  decode 1      one request; tokens a second after the first
  base 16       16 requests at once on the base model: output tokens a second over the whole run
  adapters 16   16 requests at once on 16 distinct rank-16 adapters on all seven projections
  prefill 512   one request of 512 tokens; prompt tokens a second until its first token

Writes JSON, a Markdown table with minimum, median and maximum, and a plot. An engine that is not
installed, or does not start, is named with the reason.
"""
import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import engines  # noqa: E402
from record import save, spread  # noqa: E402

PROMPT, OUTPUT, MANY, LONG = 32, 48, 16, 512
CASES = ("decode 1", "base 16", "adapters 16", "prefill 512")


def prompts(count, length, seed):
    numbers = random.Random(seed)
    return [[numbers.randrange(300, 31000) for _ in range(length)] for _ in range(count)]


def measure(engine, adapters, seed):
    """One round of one engine."""
    # The first requests of a kind pay for what is made lazily, memory pages among it.
    engine.ask(prompts(MANY, PROMPT, seed), [None] * MANY, 4)
    engine.ask(prompts(MANY, PROMPT, seed + 1), [i % adapters for i in range(MANY)], 4)
    result = {}
    one = engine.ask(prompts(1, PROMPT, seed + 2), [None], OUTPUT)[0]
    result["decode 1"] = {"tokens_per_s": (one["tokens"] - 1) / (one["last_s"] - one["first_s"])}
    for case, which in (("base 16", [None] * MANY),
                        ("adapters 16", [i % adapters for i in range(MANY)])):
        answers = engine.ask(prompts(MANY, PROMPT, seed + 3 + len(result)), which, OUTPUT)
        assert all(a["tokens"] == OUTPUT for a in answers), answers
        result[case] = {
            "tokens_per_s": sum(a["tokens"] for a in answers) / max(a["last_s"] for a in answers),
            "ttft_mean_s": statistics.mean(a["first_s"] for a in answers)}
    one = engine.ask(prompts(1, LONG, seed + 9), [None], 1)[0]
    result["prefill 512"] = {"tokens_per_s": LONG / one["first_s"]}
    result["rss_bytes"] = engine.rss_bytes()
    return result


def limits(bench, config):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run([bench, "roofline", "--model", str(config), "--batch", "1,16", "--rank", "16",
                        "--json", out.name], check=True, stdout=subprocess.DEVNULL)
        return json.load(open(out.name, encoding="utf-8"))["limits"]


def summarize(rounds):
    order = [kind.name for kind in engines.ENGINES]
    names = sorted({name for r in rounds for name in r}, key=order.index)
    table = {}
    for name in names:
        mine = [r[name] for r in rounds if name in r]
        table[name] = {case: spread([m[case]["tokens_per_s"] for m in mine]) for case in CASES}
        table[name]["ttft of adapters 16"] = spread([m["adapters 16"]["ttft_mean_s"] for m in mine])
        ours = engines.AGAINST.get(name)
        if ours:
            table[name]["lorad is faster by"] = {
                case: spread([r[ours][case]["tokens_per_s"] / r[name][case]["tokens_per_s"]
                              for r in rounds if name in r and ours in r]) for case in CASES}
    return table


def markdown(result):
    def cell(s, form="{:.1f}"):
        return " / ".join(form.format(s[k]) for k in ("min", "median", "max"))
    lines = ["| tok/s, minimum / median / maximum | " + " | ".join(CASES) +
             " | mean TTFT of adapters 16, s |", "|---|" + "---:|" * (len(CASES) + 1)]
    for name, row in result["table"].items():
        lines.append(f"| {name} | " + " | ".join(cell(row[c]) for c in CASES) +
                     f" | {cell(row['ttft of adapters 16'], '{:.2f}')} |")
        if name in engines.AGAINST:
            lines.append(f"| {engines.AGAINST[name]} / {name} | " + " | ".join(
                cell(row["lorad is faster by"][c], "{:.2f}") for c in CASES) + " | |")
    for name, reason in result["missing"].items():
        lines.append(f"| {name} | not measured: {reason} |" + " |" * len(CASES))
    return "\n".join(lines) + "\n"


def svg(result):
    names = list(result["table"])
    width, bar, left = 640, 16, 170
    rows = [(case, name, result["table"][name][case]) for case in CASES for name in names]
    height = 30 + len(rows) * bar + 20 * len(CASES)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="sans-serif" font-size="11">',
             f'<rect width="{width}" height="{height}" fill="white"/>']
    y = 10
    for case in CASES:
        lines.append(f'<text x="4" y="{y + 12}" font-weight="bold">{case}, tok/s</text>')
        y += 18
        top = max(result["table"][n][case]["max"] for n in names)
        for name in names:
            s = result["table"][name][case]
            length = (width - left - 60) * s["median"] / top
            lines.append(f'<text x="12" y="{y + 11}">{name}</text><rect x="{left}" y="{y + 2}" '
                         f'width="{length:.1f}" height="{bar - 5}" '
                         f'fill="{"#36c" if name.startswith("lorad") else "#aaa"}"/>'
                         f'<text x="{left + length + 4:.1f}" y="{y + 11}">{s["median"]:.1f}</text>')
            y += bar
    return "\n".join([*lines, "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="what make_model.py wrote")
    parser.add_argument("--lorad", default="build/lorad")
    parser.add_argument("--bench", default="build/lorad-bench")
    parser.add_argument("--llama-server", default="")
    parser.add_argument("--vllm", default="")
    parser.add_argument("--python", default=sys.executable, help="one that has torch and peft")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="", help="names, comma-separated; default: all")
    parser.add_argument("--out", default=str(HERE.parent / "results" / "cpu-compare"))
    options = parser.parse_args()
    wanted = [n.strip() for n in options.engines.split(",") if n.strip()]
    rounds, missing, start_s = [], {}, {}
    for number in range(options.rounds):
        rounds.append({})
        for kind in engines.ENGINES:
            if kind.name in missing or (wanted and kind.name not in wanted):
                continue
            try:
                engine = kind(options)
            except engines.Missing as reason:
                missing[kind.name] = str(reason)
                print(kind.name, "is left out:", reason, flush=True)
                continue
            start_s.setdefault(kind.name, []).append(engine.start_s)
            try:
                rounds[-1][kind.name] = measure(engine, options.adapters, 100 * number)
                print(number, kind.name, json.dumps(rounds[-1][kind.name]), flush=True)
            except Exception as failure:  # a peer's failure must not lose what the others did
                missing[kind.name] = f"failed: {failure}"[:200]
                print(kind.name, "failed:", repr(failure)[:300], flush=True)
            finally:
                engine.stop()
    rounds = [{n: m for n, m in r.items() if n not in missing} for r in rounds]
    result = save(options.out + ".json", "lorad and other engines on one machine, in alternation; "
                                         "TinyLlama-1.1B shape, random weights, bf16", "make compare",
                  {"limits": limits(options.bench, HERE.parent / "models" / "tinyllama-1.1b"),
                   "start_s": start_s, "missing": missing, "table": summarize(rounds),
                   "rounds": rounds})
    pathlib.Path(options.out + ".md").write_text(markdown(result))
    pathlib.Path(options.out + ".svg").write_text(svg(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
