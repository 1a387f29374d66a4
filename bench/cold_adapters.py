#!/usr/bin/env python3
"""What ten thousand registered adapters cost, and what cold ones cost the others.

    python3 bench/cold_adapters.py [--lorad build/lorad] [--out bench/results/cpu-10000-adapters.json]

One run, on this machine: dummy weights of a 160M-parameter model in bf16, adapters on all seven
projections of ranks 8, 16, 32 and 64. A server has 10,000: 9,000 seeded ones and 1,000 PEFT folders
written to a temporary folder (4.5 GB, of the four attention projections). It is asked the same requests
over 5 of them and over all 10,000 by a power law, in turn: one process, for two differ by where their
memory happens to lie, by up to a third on a shared machine.

  fit       every adapter that the requests name has been used before and still is in the pool:
            at 0.6 of the rate that saturates, and eight at a time
  thrash    a pool and host memory of a tenth of what is asked for: most requests bring an adapter
            from disk; compared with what its bytes take
  calm      the gaps between the tokens of a stream on a resident adapter: alone; while 100 adapters
            that nobody has used are prefetched; while 100 short requests on resident adapters come
            in, four a second; while 100 on cold ones do
"""
import argparse
import http.client
import json
import pathlib
import random
import shutil
import signal
import statistics
import struct
import subprocess
import tempfile
import threading
import time

from record import save, spread

HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE / "models" / "llama-160m"
RANKS, SEEDED, FOLDERS = (8, 16, 32, 64), 9000, 1000
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


# ---------------------------------------------------------------- adapters on disk

def write_folder(folder, rank, seed, config):
    """bf16 numbers of about 1/64, from random bytes: sign, a fixed exponent, random mantissa."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    header, offset = {}, 0
    for layer in range(layers):
        for module in ATTENTION:
            for matrix, shape in (("A", [rank, hidden]), ("B", [hidden, rank])):
                end = offset + 2 * shape[0] * shape[1]
                header[f"base_model.model.model.layers.{layer}.self_attn.{module}"
                       f".lora_{matrix}.weight"] = {"dtype": "BF16", "shape": shape,
                                                    "data_offsets": [offset, end]}
                offset = end
    text = json.dumps(header).encode()
    data = bytearray(random.Random(seed).randbytes(offset))
    data[1::2] = data[1::2].translate(bytes(0x3c | i & 0x80 for i in range(256)))
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION)}))


# ---------------------------------------------------------------- servers

class Server:
    def __init__(self, lorad, adapters, *options, model=MODEL, dummy=True, log=subprocess.DEVNULL):
        command = [lorad, "serve", "--model", str(model), "--load-format",
                   "dummy" if dummy else "auto", "--port", "0", *options]
        for name, source in adapters:
            command += ["--adapter", f"{name}={source}"]
        begin = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        line = next(line for line in self.process.stdout if line.startswith("listening on "))
        self.start_s = time.monotonic() - begin
        self.url = line.split()[-1]
        self.host = self.url.removeprefix("http://")

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.host, timeout=600)
        connection.request(method, path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def metrics(self):
        rows = (line.rsplit(" ", 1) for line in self.request("GET", "/metrics")[1].splitlines()
                if line and line[0] != "#" and "{" not in line)
        return {name: float(value) for name, value in rows}

    def rss_bytes(self):
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as file:
            return 1024 * int(next(x for x in file if x.startswith("VmRSS")).split()[1])

    def stream(self, model, tokens, prompt=8, seed=1):
        """Moments at which the tokens of one greedy stream came."""
        ids = random.Random(seed)
        connection = http.client.HTTPConnection(self.host, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(
            {"model": model, "prompt": [ids.randrange(3, 30000) for _ in range(prompt)],
             "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        moments = [time.monotonic() for line in answer if line.startswith(b"data: {")]
        connection.close()
        return moments

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def load(bench, server, *options):
    """One run of lorad-bench; its figures, and how the server's counters changed."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        before = server.metrics()
        subprocess.run([bench, "--url", server.url, "--json", out.name, "--vocabulary", "30000",
                        *options], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        after = server.metrics()
        figures = json.load(open(out.name, encoding="utf-8"))["figures"]
    change = {name: after[name] - before.get(name, 0) for name in after}
    return {"output_tokens_per_s": figures["output_tokens_per_s"], "wall_s": figures["wall_s"],
            "ttft_p50_s": figures["ttft_s"]["p50"], "ttft_p99_s": figures["ttft_s"]["p99"],
            "itl_p50_s": figures["itl_s"]["p50"], "itl_p99_s": figures["itl_s"]["p99"],
            "reads": change["lorad_adapter_reads_total"],
            "loads": change["lorad_adapter_loads_total"],
            "loaded_bytes": change["lorad_adapter_bytes_moved_total"],
            "steps": change["lorad_steps_total"], "step_s": change["lorad_step_seconds_total"],
            "step_adapter_bytes": change["lorad_step_adapter_bytes_total"]}


# ---------------------------------------------------------------- the three parts

CLOSED = ("--concurrency", "8", "--requests", "200", "--alpha", "0.2", "--input", "16:64",
          "--output", "16:48")
OPEN = ("--requests", "200", "--alpha", "0.2", "--input", "16:64", "--output", "16:48")
BELOW = 0.6  # of what the closed loop over 5 adapters did: no machine is saturated


def in_turn(bench, server, options, rounds):
    """The same load over 5 adapters and over all, the order turned round each time."""
    sides, runs = {"few": ("--adapters", "5"), "many": ()}, []
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        run = {side: load(bench, server, *options, *sides[side]) for side in order}
        runs.append({side: run[side] for side in sides})
    return runs


def fit(bench, server, rounds, read_bytes_per_s):
    few = in_turn(bench, server, CLOSED, 1)[0]["few"]  # the first pass brings them
    open_ = ("--rate", f"{BELOW * 200 / few['wall_s']:.1f}", *OPEN)
    in_turn(bench, server, open_, 1)
    result = {}
    for name, options in (("open", open_), ("closed", CLOSED)):
        runs = in_turn(bench, server, options, rounds)
        ratio = spread([r["many"]["output_tokens_per_s"] / r["few"]["output_tokens_per_s"]
                        for r in runs])
        # Eight at a time, steps follow one another: a step that reads more takes longer.
        explained = spread([r["few"]["wall_s"] / (r["few"]["wall_s"] + (
            r["many"]["step_adapter_bytes"] - r["few"]["step_adapter_bytes"]) / read_bytes_per_s)
            for r in runs])
        result[name] = {"runs": runs, "ratio": ratio}
        if name == "closed":
            result[name]["ratio_by_bytes"] = explained
        print(name, "many / few:", json.dumps(ratio), "by bytes:", json.dumps(explained), flush=True)
    return result


def first_token_s(server, name):
    begin = time.monotonic()
    return server.stream(name, 1)[0] - begin


def cold_read_s(server, names):
    """What bringing an adapter from disk adds to a first token while nothing else runs: seconds."""
    cold = statistics.mean(first_token_s(server, name) for name in names)
    return cold - statistics.mean(first_token_s(server, names[-1]) for _ in names)


def thrash(bench, server, rounds, unused, read_bytes_per_s):
    load(bench, server, *CLOSED)
    alone_s = cold_read_s(server, unused)
    runs = in_turn(bench, server, CLOSED, rounds)
    ratio = spread([r["many"]["output_tokens_per_s"] / r["few"]["output_tokens_per_s"]
                    for r in runs])
    # Steps that read more take longer, and reads, one after another, the time that they take alone.
    explained = spread([r["few"]["wall_s"] / (
        r["few"]["wall_s"] + r["many"]["reads"] * alone_s + (
            r["many"]["step_adapter_bytes"] - r["few"]["step_adapter_bytes"]) / read_bytes_per_s)
        for r in runs])
    print("thrash, many / few:", json.dumps(ratio), "by bytes:", json.dumps(explained), "a read alone:",
          round(alone_s, 4), "s; reads:", runs[-1]["many"]["reads"], flush=True)
    return {"runs": runs, "ratio": ratio, "ratio_by_bytes": explained, "cold_read_s": alone_s}


def gaps(streams, until=float("inf")):
    values = sorted(b - a for moments in streams for a, b in zip(moments, moments[1:])
                    if b <= until)
    return {"count": len(values), "p50_s": values[len(values) // 2],
            "p99_s": values[int(len(values) * 0.99)], "max_s": values[-1]}


def beside(server, resident, work):
    """A stream's gaps while work() runs; another stream follows as long as it does."""
    done, moments = [], []
    thread = threading.Thread(target=lambda: (time.sleep(0.2), work(), done.append(time.monotonic())))
    thread.start()
    while not done:
        moments.append(server.stream(resident, 1900))
    thread.join()
    return gaps(moments, done[0])


def calm(server, names, rounds):
    """`names`: adapters that have never been used."""
    resident = names[:21]
    for name in resident:
        server.stream(name, 2)
    cold = iter(names[21:])
    pause = random.Random(3)

    def requests(pick):
        threads = []
        for _ in range(100):
            time.sleep(pause.expovariate(4))
            threads.append(threading.Thread(target=server.stream, args=(pick(), 2, 16)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def prefetch():
        before = server.metrics()["lorad_adapter_reads_total"]
        for _ in range(100):
            while server.request("POST", f"/v1/adapters/{next(cold)}/prefetch")[0] == 429:
                time.sleep(0.05)
        while server.metrics()["lorad_adapter_reads_total"] < before + 100:
            time.sleep(0.1)

    runs = []
    for _ in range(rounds):
        run = {"alone": gaps([server.stream(resident[0], 1900)]),
               "prefetch": beside(server, resident[0], prefetch),
               "resident_requests": beside(server, resident[0],
                                           lambda: requests(lambda: pause.choice(resident[1:]))),
               "cold_requests": beside(server, resident[0], lambda: requests(lambda: next(cold)))}
        runs.append(run)
        print({k: {a: round(b * 1e3, 2) if a != "count" else b for a, b in v.items()}
               for k, v in run.items()}, flush=True)
    return {"runs": runs,
            "prefetch_p99_growth": spread([r["prefetch"]["p99_s"] / r["alone"]["p99_s"] - 1
                                           for r in runs]),
            "cold_requests_p99_growth": spread([r["cold_requests"]["p99_s"] /
                                                r["resident_requests"]["p99_s"] - 1
                                                for r in runs])}


# ---------------------------------------------------------------- all of it

def read_bandwidth(bench):
    """Bytes a second that this machine reads, as lorad-bench roofline measures them."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run([bench, "roofline", "--model", str(MODEL), "--batch", "1", "--json",
                        out.name], check=True, stdout=subprocess.DEVNULL)
        return json.load(open(out.name, encoding="utf-8"))["limits"]["read_bytes_per_s"]


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lorad", default="build/lorad")
    options.add_argument("--bench", default="build/lorad-bench")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", default=str(HERE / "results" / "cpu-10000-adapters.json"))
    options = options.parse_args()
    config = json.loads((MODEL / "config.json").read_text())
    root = pathlib.Path(tempfile.mkdtemp(prefix="lorad-adapters-"))
    try:
        for i in range(FOLDERS):
            write_folder(root / f"f{i:04d}", RANKS[i % 4], i, config)
        # Every tenth is a folder, so that both kinds are popular.
        adapters = []
        for i in range(SEEDED + FOLDERS):
            adapters.append((f"a{i:05d}", str(root / f"f{i // 10:04d}") if i % 10 == 9 else
                             f"dummy:rank={RANKS[i % 4]},seed={i},modules=all"))
        bandwidth = read_bandwidth(options.bench)
        print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s", flush=True)
        # What is in the pool need not be in host memory, too; a long-running server has it full.
        # Drafts would make tokens come in bunches: gaps are to be those between steps.
        steady = ("--speculation", "off")
        roomy = ("--pool-bytes", "5GiB", "--host-bytes", "1GiB", *steady)
        many = Server(options.lorad, adapters, *roomy)
        registered = {"adapters": len(adapters), "start_s": many.start_s,
                      "rss_bytes_before_use": many.rss_bytes()}
        print("10,000 registered, serving after", round(many.start_s, 2), "s", flush=True)
        results = {"registered": registered,
                   "fit": fit(options.bench, many, options.rounds, bandwidth)}
        listed = json.loads(many.request("GET", "/v1/adapters")[1])["data"]
        unused = [a["id"] for a in listed if a["requests"] == 0 and a["tier"] == "disk"]
        random.Random(4).shuffle(unused)
        results["calm"] = calm(many, unused, options.rounds)
        many.stop()
        tight = Server(options.lorad, adapters, "--pool-bytes", "768MiB", "--host-bytes", "512MiB",
                       *steady)
        results["thrash"] = thrash(options.bench, tight, options.rounds, unused[-40:], bandwidth)
        tight.stop()
    finally:
        shutil.rmtree(root)
    save(options.out, "10,000 registered adapters against 5; cold adapters beside a stream; "
                      "160M-parameter model, dummy weights, bf16",
         "python3 bench/cold_adapters.py", results, read_bytes_per_s=bandwidth)


if __name__ == "__main__":
    main()
