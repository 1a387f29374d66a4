#!/usr/bin/env python3
"""What serving costs before and beside the tokens: time to the first one, memory, and what adapters
that nobody uses cost the base model.

    bench/compare/make_model.py build/compare/model     (once; needs numpy)
    python3 bench/footprint.py [--model build/compare/model/hf] [--out bench/results/cpu-footprint.json]

start     from the program's start to its first token, weights in the page cache; resident memory then,
          and what of it is neither weights, as they are kept, nor pool
base      requests on the base model, sixteen at once, with no adapter registered and with 10,000, in
          alternation: the ratio of output tokens a second; and that of a second server with none, which
          tells how much of it is chance
"""
import argparse
import json
import pathlib
import re
import tempfile
import time

import cold_adapters as cold
from record import save, spread

HERE = pathlib.Path(__file__).resolve().parent
POOL = 512 << 20


def start(lorad, model):
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        server = cold.Server(lorad, [], "--pool-bytes", str(POOL), "--served-model-name", "base",
                             model=model, dummy=False, log=log)
        first = server.stream("base", 1)[0] - begin
        log.seek(0)
        matrices = int(re.search(r"matrix_bytes=(\d+)", log.read())[1])
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    weights = matrices + 2 * config["vocab_size"] * config["hidden_size"]  # and the embedding
    rss, before = server.rss_bytes(), 0
    while rss > before:  # the pool's pages become present beside serving
        time.sleep(2)
        rss, before = server.rss_bytes(), rss
    result = {"first_token_s": first, "ready_s": server.start_s, "rss_bytes": rss,
              "weight_bytes": weights, "pool_bytes": POOL}
    result["other_bytes"] = result["rss_bytes"] - weights - POOL
    server.stop()
    return result


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lorad", default="build/lorad")
    options.add_argument("--bench", default="build/lorad-bench")
    options.add_argument("--model", default="build/compare/model/hf")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--out", default=str(HERE / "results" / "cpu-footprint.json"))
    options = options.parse_args()
    for file in pathlib.Path(options.model).glob("*.safetensors"):
        file.read_bytes()  # into the page cache
    starts = [start(options.lorad, options.model) for _ in range(3)]
    print(json.dumps(starts[-1]), flush=True)
    adapters = [(f"a{i:05d}", f"dummy:rank={cold.RANKS[i % 4]},seed={i}") for i in range(10000)]
    none, control, many = servers = [cold.Server(options.lorad, registered, "--pool-bytes", "1GiB")
                                     for registered in ([], [], adapters)]
    load = ("--base-only", "--concurrency", "16", "--requests", "128", "--input", "16:64", "--output",
            "32:64")
    for server in servers:
        cold.load(options.bench, server, *load)
    ratios, chance = [], []
    for number in range(options.rounds):  # turned round each time
        speed = {server: cold.load(options.bench, server, *load)["output_tokens_per_s"]
                 for server in (servers if number % 2 == 0 else servers[::-1])}
        ratios.append(speed[many] / speed[none])
        chance.append(speed[control] / speed[none])
        print(number, round(ratios[-1], 4), round(chance[-1], 4), flush=True)
    for server in servers:
        server.stop()
    result = save(options.out, "start, memory, and idle adapters' cost to the base model",
                  "python3 bench/footprint.py",
                  {"first_token_s": spread([s["first_token_s"] for s in starts]), "starts": starts,
                   "base_with_10000_registered": spread(ratios),
                   "another_with_none": spread(chance)})
    print(json.dumps({k: result[k] for k in ("first_token_s", "base_with_10000_registered")}))


if __name__ == "__main__":
    main()
