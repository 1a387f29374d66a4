#!/usr/bin/env python3
"""What an adapter's first use adds to the time to the first token.

    bench/gpu/first_token.py --url URL --touch PREFIX   one token from each adapter whose id so begins
    bench/gpu/first_token.py --url URL --cold PREFIX [--decoding N] [--commit HASH] [--json FILE]

The second asks, in turn, for one token behind a prompt of 32: an adapter that is in the pool, and one of
PREFIX that is not, be it in host memory or on disk; alone on the server, then beside N streams that
decode on the first. Touch more adapters than the pool holds before. Standard library alone.
"""
import argparse
import concurrent.futures
import http.client
import json
import pathlib
import statistics
import sys
import threading
import time
import urllib.parse

PROMPT = [(31 * i) % 200 + 3 for i in range(32)]


class Server:
    def __init__(self, url):
        self.host = urllib.parse.urlsplit(url).netloc

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.host, timeout=300)
        connection.request(method, path, body and json.dumps(body),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]}")
        return json.loads(text) if text else None

    def names(self, prefix):
        models = self.call("GET", "/v1/models")["data"]
        return [m["id"] for m in models if m.get("parent") and m["id"].startswith(prefix)]

    def ask(self, name, tokens=1):
        self.call("POST", "/v1/completions", {
            "model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True})

    def seconds(self, name):
        begin = time.perf_counter()
        self.ask(name)
        return time.perf_counter() - begin

    def tier(self, name):
        return self.call("GET", f"/v1/adapters/{name}")["tier"]


def touch(server, prefix):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return len(list(pool.map(server.ask, server.names(prefix))))


def decode(server, name, begun, until):
    server.ask(name)
    begun.wait()
    while not until.is_set():
        server.ask(name, 64)


def measure(server, resident, cold):
    """The median of what each of `cold`, and the resident one before it, takes."""
    pairs = [(server.seconds(resident), server.seconds(name)) for name in cold]
    return {"adapters": len(cold), "resident_s": statistics.median(p[0] for p in pairs),
            "cold_s": statistics.median(p[1] for p in pairs),
            "added_s": statistics.median(b - a for a, b in pairs)}


def beside(server, resident, cold, streams):
    begun, until = threading.Barrier(streams + 1), threading.Event()
    threads = [threading.Thread(target=decode, args=(server, resident, begun, until))
               for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        begun.wait(300)
        return measure(server, resident, cold)
    finally:
        until.set()
        for thread in threads:
            thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--touch", metavar="PREFIX")
    parser.add_argument("--cold", metavar="PREFIX")
    parser.add_argument("--decoding", type=int, default=16)
    parser.add_argument("--commit", default="")
    parser.add_argument("--json")
    options = parser.parse_args()
    server = Server(options.url)
    if options.touch is not None:
        print("one token from each of", touch(server, options.touch), "adapters")
    if options.cold is None:
        return 0
    names = server.names(options.cold)
    resident, tiers = names[0], {"host": [], "disk": []}
    for name in names[1:]:
        tiers.setdefault(server.tier(name), []).append(name)
    rows = []
    server.ask(resident)
    for tier in "host", "disk":
        half = len(tiers[tier]) // 2
        if half == 0:
            print("no two adapters are in", tier)
            continue
        for streams, cold in (0, tiers[tier][:half]), (options.decoding, tiers[tier][half:]):
            row = {"tier": tier, "decoding": streams, **beside(server, resident, cold, streams)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(
            {"what": "the first token of an adapter that is not in the pool, against one that is",
             "command": " ".join(["bench/gpu/first_token.py", *sys.argv[1:]]),
             "commit": options.commit, "rows": rows}, indent=1) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
