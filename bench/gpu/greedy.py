#!/usr/bin/env python3
"""The same requests to two servers; their greedy tokens must be the same.

    bench/gpu/greedy.py LORAD_A DEVICE_A LORAD_B DEVICE_B

A tiny model with random weights in f32, base and three adapters of different ranks, eight requests at
once. Standard library alone, so that it runs on a bare machine.
"""
import concurrent.futures
import http.client
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
          "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
          "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
          "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
          "bos_token_id": 0, "eos_token_id": 1}
NAMES = ["base", "a", "b", "c"]


def ask(port, i):
    body = {"model": NAMES[i % 4], "prompt": [(7 * i + j * j) % 500 + 2 for j in range(5 + 40 * i)],
            "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body),
                       {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    return answer["choices"][0]["token_ids"]


def answers(lorad, device, model):
    server = subprocess.Popen(
        [lorad, "serve", "--model", model, "--served-model-name", "base", "--load-format", "dummy",
         "--port", "0", "--device", device, "--dtype", "f32", "--pool-bytes", "64MiB", "--adapter",
         "a=dummy:rank=16,seed=7,modules=all", "--adapter", "b=dummy:rank=8,seed=8,modules=qkvo",
         "--adapter", "c=dummy:rank=33,seed=9,modules=all"],
        stdout=subprocess.PIPE, text=True)
    port = next(int(line.rsplit(":", 1)[1]) for line in server.stdout
                if line.startswith("listening on "))
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda i: ask(port, i), range(8)))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def main():
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        one = answers(sys.argv[1], sys.argv[2], folder)
        two = answers(sys.argv[3], sys.argv[4], folder)
    same = sum(a == b for a, b in zip(one, two))
    print(f"{same} of {len(one)} requests have the same {len(one[0])} greedy tokens on "
          f"{sys.argv[2]} and {sys.argv[4]}")
    sys.exit(same != len(one))


if __name__ == "__main__":
    main()
