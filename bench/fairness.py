#!/usr/bin/env python3
"""The service that two tenants get while one floods: measured, as JSON and as a plot.

    python3 bench/fairness.py [--lorad build/lorad] [--out bench/results/cpu-fairness]

A server that runs four requests at once; a tenant that keeps 60 requests inside, and a polite one
that keeps six. Service is counted as the virtual token counter does (arXiv 2401.00588): 1 for each
prompt token of a request that has begun, 2 for each token generated. While both have requests
waiting, what they got must not drift apart by more than the paper's bound (theorem 4.8),
2 max(1 x longest prompt, 2 x tokens of a full batch). For comparison the flood's share by arrival
order alone would be 60 in 66.
"""
import argparse
import http.client
import json
import pathlib
import random
import subprocess
import threading
import time

from record import save

HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE / "models" / "llama-160m"
BATCH, PROMPT_MAX, OUTPUT_MAX, SECONDS = 4, 64, 32, 40
TENANTS = {"flood": 60, "polite": 6}


class Service:
    """What each tenant got, as a list of (seconds, total)."""
    def __init__(self):
        self.lock, self.begin = threading.Lock(), time.monotonic()
        self.total = dict.fromkeys(TENANTS, 0.0)
        self.curve = {name: [(0.0, 0.0)] for name in TENANTS}

    def add(self, tenant, amount):
        with self.lock:
            self.total[tenant] += amount
            self.curve[tenant].append((time.monotonic() - self.begin, self.total[tenant]))


def keep_asking(host, tenant, seed, service, until):
    numbers = random.Random(seed)
    while time.monotonic() < until:
        prompt = numbers.randrange(8, PROMPT_MAX + 1)
        connection = http.client.HTTPConnection(host, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(
            {"model": "base", "prompt": [numbers.randrange(3, 30000) for _ in range(prompt)],
             "max_tokens": numbers.randrange(8, OUTPUT_MAX + 1), "ignore_eos": True,
             "temperature": 0, "stream": True, "user": tenant}))
        first = True
        for line in connection.getresponse():
            if not line.startswith(b"data: {") or b'"finish_reason":null' not in line:
                continue
            service.add(tenant, 2 + (prompt if first else 0))
            first = False
        connection.close()


def at(curve, moment):
    """The last total at or before a moment; curves are sorted."""
    low, high = 0, len(curve)
    while high - low > 1:
        middle = (low + high) // 2
        if curve[middle][0] <= moment:
            low = middle
        else:
            high = middle
    return curve[low][1]


def svg(curves, bound):
    width, height, left = 640, 360, 60
    top = max(curve[-1][1] for curve in curves.values())

    def path(curve, shift=0):
        step = max(1, len(curve) // 400)
        return " ".join(f"{left + (width - left) * t / SECONDS:.1f},"
                        f"{height - 30 - (height - 60) * max(0, v + shift) / top:.1f}"
                        for t, v in curve[::step] if t <= SECONDS)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="white"/>',
             f'<text x="{left}" y="16">service (prompt tokens + 2 x generated) of a flooding and a '
             f'polite tenant; grey: polite plus and minus the bound of {bound:.0f}</text>']
    for shift in (bound, -bound):
        lines.append(f'<polyline fill="none" stroke="#bbb" points="{path(curves["polite"], shift)}"/>')
    for name, colour in (("flood", "#c33"), ("polite", "#36c")):
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
                     f'points="{path(curves[name])}"/>')
        lines.append(f'<text x="{left + 20}" y="{40 + 16 * (name == "polite")}" fill="{colour}">'
                     f'{name}: {TENANTS[name]} requests inside</text>')
    lines += [f'<text x="4" y="40">{top:.0f}</text>', f'<text x="4" y="{height - 30}">0</text>',
              f'<text x="{width - 60}" y="{height - 8}">{SECONDS} s</text>', "</svg>"]
    return "\n".join(lines) + "\n"


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lorad", default="build/lorad")
    options.add_argument("--out", default=str(HERE / "results" / "cpu-fairness"))
    options = options.parse_args()
    server = subprocess.Popen(
        [options.lorad, "serve", "--model", str(MODEL), "--load-format", "dummy", "--port", "0",
         "--served-model-name", "base", "--max-seqs", str(BATCH), "--pool-bytes", "512MiB"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    host = next(line for line in server.stdout if line.startswith("listening on ")).split("/")[-1]
    host, service = host.strip(), Service()
    until = service.begin + SECONDS
    threads = [threading.Thread(target=keep_asking, args=(host, name, 1000 * i + n, service, until))
               for i, (name, count) in enumerate(TENANTS.items()) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.terminate()
    server.wait(60)
    bound = 2 * max(PROMPT_MAX, 2 * BATCH * (PROMPT_MAX + OUTPUT_MAX))
    # From the first second, when both have come, to the end of the asking: both have some waiting.
    moments = [1 + i * (SECONDS - 2) / 400 for i in range(401)]
    differences = [at(service.curve["flood"], m) - at(service.curve["polite"], m) for m in moments]
    drift = max(differences) - min(differences)
    shares = {name: at(service.curve[name], SECONDS - 1) for name in TENANTS}
    result = save(options.out + ".json", "service of two tenants, one of which floods",
                  "python3 bench/fairness.py", {"inside": TENANTS, "service": shares,
                                                "drift": drift, "bound": bound,
                                                "within": drift <= bound})
    pathlib.Path(options.out + ".svg").write_text(svg(service.curve, bound))
    print(json.dumps(result))
    return 0 if drift <= bound else 1


if __name__ == "__main__":
    raise SystemExit(main())
