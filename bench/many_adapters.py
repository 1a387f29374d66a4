#!/usr/bin/env python3
"""16 requests on 16 distinct adapters at once against the same 16 one after another.

    python3 bench/many_adapters.py [--lorad build/lorad] [--rounds 3] [--out bench/results/X.json]

Starts lorad with dummy weights of a TinyLlama-1.1B shape and 16 rank-16 adapters on all seven
projections, prompts of 32 tokens, 48 tokens out, greedy, end of text ignored. The two sides run in
alternation; the ratio of output tokens per second is given as minimum, median and maximum.
"""
import argparse
import concurrent.futures
import http.client
import json
import pathlib
import signal
import statistics
import subprocess
import time

from record import save, spread

HERE = pathlib.Path(__file__).resolve().parent
ADAPTERS, PROMPT, OUTPUT = 16, 32, 48


def ask(port, number):
    """One streamed request; returns its output tokens and the seconds to its first one."""
    body = json.dumps({"model": f"a{number:02d}", "prompt": [(number * 97 + i * 31) % 31000 + 1
                                                             for i in range(PROMPT)],
                       "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True,
                       "stream_options": {"include_usage": True}})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    begin, first, tokens = time.monotonic(), None, 0
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event["choices"] and first is None:
            first = time.monotonic() - begin
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    connection.close()
    assert tokens == OUTPUT, tokens
    return tokens, first


def side(port, concurrency):
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        results = list(pool.map(lambda n: ask(port, n), range(ADAPTERS)))
    seconds = time.monotonic() - begin
    return {"seconds": seconds, "output_tokens_per_s": sum(t for t, _ in results) / seconds,
            "ttft_mean_s": statistics.mean(f for _, f in results)}


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--lorad", default="build/lorad")
    options.add_argument("--model", default=str(HERE / "models" / "tinyllama-1.1b"))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", default=str(HERE / "results" / "cpu-16-adapters.json"))
    options = options.parse_args()
    command = [options.lorad, "serve", "--model", options.model, "--load-format", "dummy",
               "--port", "0", "--max-model-len", "512", "--pool-bytes", "2GiB"]
    for i in range(ADAPTERS):
        command += ["--adapter", f"a{i:02d}=dummy:rank=16,seed={i},modules=all"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    port = next(int(line.rsplit(":", 1)[1]) for line in server.stdout
                if line.startswith("listening on "))
    side(port, ADAPTERS)  # warms caches on both sides of the wire
    rounds = []
    for number in range(options.rounds):
        rounds.append({"together": side(port, ADAPTERS), "one_after_another": side(port, 1)})
        print(number, json.dumps(rounds[-1]), flush=True)
    server.send_signal(signal.SIGTERM)
    server.wait(60)
    ratios = [r["together"]["output_tokens_per_s"] / r["one_after_another"]["output_tokens_per_s"]
              for r in rounds]
    result = save(options.out, "16 concurrent requests on 16 distinct rank-16 all-7 adapters against "
                               "the same 16 one after another; TinyLlama-1.1B shape, dummy weights, bf16",
                  "python3 bench/many_adapters.py", {"ratio": spread(ratios), "rounds": rounds})
    print(json.dumps(result["ratio"]))


if __name__ == "__main__":
    main()
