"""The whole server on the CUDA backend's kernels, emulated: the same greedy tokens as on the CPU
backend, whoever asks at the same time. build/tests/emulation/lorad-emulated is made by the tests."""
import concurrent.futures
import os
import pathlib
import subprocess

import pytest
import server
from server import Server

EMULATED = str(pathlib.Path(server.LORAD).parent / "tests" / "emulation" / "lorad-emulated")
OPTIONS = ("--adapter", "a=dummy:rank=16,seed=7,modules=all",
           "--adapter", "b=dummy:rank=8,seed=8,modules=qkvo",
           "--adapter", "c=dummy:rank=33,seed=9,modules=all", "--dtype", "f32")


def answers(device, monkeypatch, program):
    monkeypatch.setattr(server, "LORAD", program)
    one = Server(*OPTIONS, "--device", device)
    models = [m["id"] for m in one.request("GET", "/v1/models")[1]["data"]]
    asked = [dict(model=models[i % 4], prompt=[(7 * i + j * j) % 500 + 2 for j in range(5 + 9 * i)],
                  max_tokens=12) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda fields: one.tokens(**fields), asked))
    assert one.stop() == 0
    return tokens


@pytest.mark.skipif(not os.path.exists(EMULATED), reason="the emulation is for x86-64")
def test_same_tokens_as_the_cpu(monkeypatch):
    cpu = answers("cpu", monkeypatch, server.LORAD)
    assert answers("cuda", monkeypatch, EMULATED) == cpu
    assert len({tuple(t) for t in cpu}) == 8


@pytest.mark.skipif(not os.path.exists(EMULATED), reason="the emulation is for x86-64")
def test_heads_beyond_the_kernel_are_refused_at_load(tmp_path):
    config = {**server.CONFIG, "hidden_size": 64 * 128, "num_attention_heads": 64,
              "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(server.json.dumps(config))
    run = subprocess.run([EMULATED, "serve", "--model", str(tmp_path), "--load-format", "dummy",
                          "--port", "0", "--device", "cuda"], capture_output=True, text=True,
                         timeout=60)
    assert run.returncode == 1 and "64 on one" in run.stderr, run.stderr


def test_no_device_is_a_sentence(tmp_path):
    """Where there is no GPU: --device cuda says so and stops; auto serves on the CPU."""
    (tmp_path / "config.json").write_text(server.json.dumps(server.CONFIG))
    command = [server.LORAD, "serve", "--model", str(tmp_path), "--load-format", "dummy", "--port",
               "0", "--device", "cuda"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=hidden)
    assert run.returncode != 0 and "--device cpu" in run.stderr
