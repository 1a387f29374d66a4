#!/usr/bin/env python3
"""What speculation by prompt lookup gains, where texts repeat themselves and where they do not.

    python3 bench/speculation.py [--lorad build/lorad] [--out bench/results/cpu-speculation.json]

The demo model, greedy, one request after another, --speculation off and auto in alternation: Go code
on its adapter, which repeats itself; dictionary entries and novels, which do so less; and eight
requests at once. The output must be the same in both.
"""
import argparse
import concurrent.futures
import json
import pathlib
import time

from cold_adapters import Server
from record import save

HERE = pathlib.Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
TEXTS = {
    "Go code, one at a time": ("gopher", 1, ["// Len returns the number of", "type Reader struct {",
                                             "func (b *Buffer) Write(p []byte) (n int, err error) {",
                                             "// A Scanner"]),
    "Go code, eight at once": ("gopher", 8, [f"// Test{i} returns the" for i in range(16)]),
    "dictionary, one at a time": ("webster", 1, ["Harmony, n.", "Garden, n.", "To walk, v. i.",
                                                 "Stone, n."]),
    "novel, one at a time": ("model", 1, ["The young lady was", "It was a fine morning",
                                          "He could not", "Her mother"]),
}


def run(server, model, at_once, prompts):
    def ask(prompt):
        status, text = server.request("POST", "/v1/completions", {
            "model": model, "prompt": prompt, "max_tokens": 300, "temperature": 0,
            "ignore_eos": True})
        assert status == 200, text
        answer = json.loads(text)
        return answer["usage"]["completion_tokens"], answer["choices"][0]["text"]
    before, begin = server.metrics(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(ask, prompts))
    took, after = time.monotonic() - begin, server.metrics()

    def change(what):
        name = f"vllm:spec_decode_num_{what}_tokens_total"
        return after[name] - before[name]
    return {"tokens_per_s": sum(count for count, _ in answers) / took, "drafts": change("draft"),
            "accepted": change("accepted")}, [text for _, text in answers]


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lorad", default="build/lorad")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", default=str(HERE / "results" / "cpu-speculation.json"))
    options = options.parse_args()
    adapters = [(name, DEMO / "adapters" / name) for name in ("gopher", "webster")]
    servers = {mode: Server(options.lorad, adapters, "--speculation", mode, "--prefix-cache", "0",
                            "--served-model-name", "model", model=DEMO / "model", dummy=False)
               for mode in ("off", "auto")}
    rows = []
    for text, (model, at_once, prompts) in TEXTS.items():
        row = {"text": text, "off": [], "auto": []}
        for server in servers.values():
            run(server, model, at_once, ["The " * 100, *prompts[:1]])  # rates are measured
        for _ in range(options.rounds):
            outputs = []
            for mode, server in servers.items():
                figures, output = run(server, model, at_once, prompts)
                row[mode].append(figures)
                outputs.append(output)
            assert outputs[0] == outputs[1], "another output with speculation"
        rows.append(row)
        print(text, [round(r["tokens_per_s"]) for r in row["off"]],
              [round(r["tokens_per_s"]) for r in row["auto"]], flush=True)
    for server in servers.values():
        server.stop()
    save(options.out, "the demo model (5 million parameters), greedy, 300 tokens out",
         "python3 bench/speculation.py", {"rows": rows})


if __name__ == "__main__":
    main()
