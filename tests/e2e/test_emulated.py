"""The whole server on the CUDA backend's kernels, emulated: the same tokens as on the CPU
backend, greedy and drawn, whoever asks at the same time. build/tests/emulation/lorad-emulated is made by the tests."""
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


def answers(device, monkeypatch, program, options=OPTIONS):
    monkeypatch.setattr(server, "LORAD", program)
    one = Server(*options, "--device", device)
    models = [m["id"] for m in one.request("GET", "/v1/models")[1]["data"]]
    asked = [dict(model=models[i % 4], prompt=[(7 * i + j * j) % 500 + 2 for j in range(5 + 9 * i)],
                  max_tokens=12) for i in range(8)]
    for i, how in enumerate((dict(), dict(top_p=0.8), dict(top_k=5), dict(min_p=0.05, top_k=50))):
        asked[2 * i + 1].update(temperature=0.9, seed=i, **how)  # drawn on the device, as here
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
def test_adapters_come_and_go_beside_steps(monkeypatch):
    """Room for three of nine adapters: they are copied into pages that others left, on a stream of
    their own, while steps are queued; tokens stay what they are on the CPU."""
    names = [f"r{i}" for i in range(9)]
    options = [x for i, name in enumerate(names)
               for x in ("--adapter", f"{name}=dummy:rank={24 + i},seed={i},modules=all")]
    options += ["--dtype", "f32", "--pool-bytes", "3MiB", "--max-model-len", "128"]
    results = []
    for device, program in ("cpu", server.LORAD), ("cuda", EMULATED):
        monkeypatch.setattr(server, "LORAD", program)
        one = Server(*options, "--device", device)
        asked = [dict(model=names[(5 * i) % 9], prompt=[(11 * i + j * j) % 500 + 2
                                                       for j in range(3 + 2 * (i % 9))],
                      max_tokens=6) for i in range(27)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            results.append(list(pool.map(lambda fields: one.tokens(**fields), asked)))
        assert one.metric("lorad_adapter_evictions_total") >= 9
        assert one.stop() == 0
    assert results[0] == results[1]


@pytest.mark.skipif(not os.path.exists(EMULATED), reason="the emulation is for x86-64")
def test_tensor_cores_recorded_and_beside_each_other(monkeypatch):
    """bf16 at widths of whole tiles: the same tokens whether steps are recorded and replayed, with
    LoRA on a stream of its own, or queued one operation after the other; and first tokens' log
    probabilities as the CPU backend has them, as far as bf16 goes."""
    wide = {**server.CONFIG, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    monkeypatch.setattr(server, "CONFIG", wide)
    options = (*OPTIONS[:-1], "bf16")
    monkeypatch.setenv("LORAD_CUDA_GRAPHS", "0")
    queued = answers("cuda", monkeypatch, EMULATED, options)
    monkeypatch.setenv("LORAD_CUDA_GRAPHS", "1")
    monkeypatch.setenv("LORAD_CUDA_OVERLAP", "1")
    assert answers("cuda", monkeypatch, EMULATED, options) == queued
    assert len({tuple(t) for t in queued}) == 8
    probabilities = []
    for device, program in ("cpu", server.LORAD), ("cuda", EMULATED):
        monkeypatch.setattr(server, "LORAD", program)
        one = Server(*options, "--device", device)
        models = [m["id"] for m in one.request("GET", "/v1/models")[1]["data"]]
        firsts = [one.complete(model=model, prompt=list(range(5, 45)), max_tokens=1, temperature=0,
                               logprobs=5)[1]["choices"][0]["logprobs"]["top_logprobs"][0]
                  for model in models]
        probabilities.append(firsts)
        assert one.stop() == 0
    for cpu, cuda in zip(*probabilities):
        shared = cpu.keys() & cuda.keys()
        assert len(shared) >= 4 and all(abs(cpu[t] - cuda[t]) < 0.02 for t in shared), (cpu, cuda)


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
