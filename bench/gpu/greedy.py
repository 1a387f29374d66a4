#!/usr/bin/env python3
"""Greedy tokens on one device against what they must be.

    bench/gpu/greedy.py LORAD_A DEVICE_A LORAD_B DEVICE_B [CASES]

1. A tiny model with random weights in f32, base and three adapters of different ranks, eight requests
   at once, on both: the same tokens.
2. The demo model with its adapters in f32 on the second, all cases at once (or so many): the tokens of
   transformers + PEFT (tests/fixtures/demo/cases.jsonl, made by tests/reference/make_demo_goldens.py).
   They may part where the two best logits lie within 1e-4 there.

Standard library alone, so that it runs on a bare machine.
"""
import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
          "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
          "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
          "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
          "bos_token_id": 0, "eos_token_id": 1}
NAMES = ["base", "a", "b", "c"]
DUMMIES = ["--load-format", "dummy", "--adapter", "a=dummy:rank=16,seed=7,modules=all", "--adapter",
           "b=dummy:rank=8,seed=8,modules=qkvo", "--adapter", "c=dummy:rank=33,seed=9,modules=all"]
TIE = 1e-4


@contextlib.contextmanager
def served(lorad, device, model, *options):
    """Yields a function from (model or adapter, prompt, count) to greedy tokens."""
    server = subprocess.Popen(
        [lorad, "serve", "--model", str(model), "--served-model-name", "base", "--port", "0",
         "--device", device, "--dtype", "f32", "--pool-bytes", "64MiB", *options],
        stdout=subprocess.PIPE, text=True)
    port = next(int(line.rsplit(":", 1)[1]) for line in server.stdout
                if line.startswith("listening on "))

    def ask(name, prompt, count):
        body = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())["choices"][0]["token_ids"]
    try:
        yield ask
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def all_at_once(ask, requests):
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        return list(pool.map(lambda request: ask(*request), requests))


def two_devices(lorad_a, device_a, lorad_b, device_b):
    requests = [(NAMES[i % 4], [(7 * i + j * j) % 500 + 2 for j in range(5 + 40 * i)], 24)
                for i in range(8)]
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        for lorad, device in (lorad_a, device_a), (lorad_b, device_b):
            with served(lorad, device, folder, *DUMMIES) as ask:
                answers.append(all_at_once(ask, requests))
    same = sum(a == b for a, b in zip(*answers))
    print(f"{same} of {len(requests)} requests have the same greedy tokens on {device_a} and "
          f"{device_b}")
    return same == len(requests)


def is_right(case, tokens):
    for i, (got, wanted) in enumerate(zip(tokens, case["tokens"], strict=True)):
        if got != wanted:
            return case["gaps"][i] < TIE # what follows is another text
    return True


def reference(lorad, device, most):
    lines = (ROOT / "tests/fixtures/demo/cases.jsonl").read_text().splitlines()
    cases = [c for c in map(json.loads, lines) if len(c["adapters"]) <= 1]
    cases = cases[::max(1, -(-len(cases) // most))]
    requests = [(c["adapters"][0][0] if c["adapters"] else "base", c["prompt"], len(c["tokens"]))
                for c in cases]
    adapters = [argument for folder in sorted((ROOT / "demo/adapters").iterdir())
                for argument in ("--adapter", f"{folder.name}={folder}")]
    with served(lorad, device, ROOT / "demo/model", *adapters) as ask:
        answers = all_at_once(ask, requests)
    right = sum(map(is_right, cases, answers))
    print(f"{right} of {len(cases)} cases of the demo model have transformers' and PEFT's greedy "
          f"tokens on {device}")
    return right == len(cases) > 0


def main():
    lorad_a, device_a, lorad_b, device_b, *most = sys.argv[1:]
    good = two_devices(lorad_a, device_a, lorad_b, device_b)
    good &= reference(lorad_b, device_b, int(most[0]) if most else 10**6)
    sys.exit(not good)


if __name__ == "__main__":
    main()
