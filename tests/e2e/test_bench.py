"""lorad-bench against the served demo with 64 adapters registered, and its errors."""
import html.parser
import json
import os
import pathlib
import resource
import socket
import subprocess

import pytest
from server import ROOT, Server

BENCH = os.environ.get("LORAD_BENCH", str(ROOT / "build" / "lorad-bench"))
ROOFLINE_MODEL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
                  "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}


def bench(*options, status=0):
    run = subprocess.run([BENCH, *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == status, run.stderr + run.stdout
    return run


@pytest.fixture(scope="module")
def demo():
    folders = sorted(p for p in (ROOT / "demo" / "adapters").iterdir() if p.is_dir())
    assert len(folders) == 8
    options = []
    for i in range(64):  # each of the eight under eight names
        options += ["--adapter", f"{folders[i % 8].name}-{i // 8}={folders[i % 8]}"]
    server = Server(*options, model=ROOT / "demo" / "model")
    yield server
    assert server.stop() == 0


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.outside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href")]


def test_load(demo, tmp_path):
    run = bench("--url", demo.url, "--rate", "40", "--duration", "5", "--alpha", "0.5",
                "--input", "4:40", "--output", "2:20", "--json", str(tmp_path / "run.json"),
                "--report", str(tmp_path / "run.html"), "--commit", "abc")
    result = json.loads((tmp_path / "run.json").read_text())
    figures = result["figures"]
    assert result["adapters"] == 64 and result["commit"] == "abc"
    assert figures["completed"] == 200 and figures["failed"] == 0 and result["errors"] == []
    # ignore_eos: everybody gets what was asked for, and the server counts the same tokens
    served = sum(a["tokens"] for a in result["by_adapter"])
    assert served == sum(a["wanted"] for a in result["by_adapter"])
    assert figures["jain"] == pytest.approx(1)
    assert demo.metric("vllm:generation_tokens_total") == served
    assert figures["output_tokens_per_s"] * figures["wall_s"] == pytest.approx(served)
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        s = figures[name]
        assert 0 < s["p50"] <= s["p90"] <= s["p99"] <= s["max"], (name, s)
        if name in result["percentiles"]:
            curve = result["percentiles"][name]
            assert curve == sorted(curve) and curve[49] == s["p50"] and curve[99] == s["max"]
    assert len(result["percentiles"]) == 2
    # a chunk a token, but for last tokens that are only part of a character
    assert 0.98 * (served - 200) <= figures["itl_s"]["count"] <= served - 200
    page = Page((tmp_path / "run.html").read_text())
    assert page.tags.count("svg") == 3 and page.tags.count("polyline") == 5
    assert page.outside == []
    assert "200 requests" in run.stdout and "p99" in run.stdout


def test_closed_loop_and_text(demo, tmp_path):
    run = bench("--url", demo.url, "--concurrency", "3", "--requests", "9", "--adapters", "2",
                "--prefix", "gopher-", "--text", "--input", "2:4", "--output", "2:4",
                "--respect-eos", "--json", str(tmp_path / "run.json"))
    assert "9 completed, 0 failed" in run.stdout
    asked = {a["name"] for a in json.loads((tmp_path / "run.json").read_text())["by_adapter"]}
    assert asked and asked <= {"gopher-0", "gopher-1"}


def test_errors(demo, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "refused" in bench("--url", nobody, status=1).stderr
    assert "http://" in bench("--url", "https://x", status=1).stderr
    assert "lists 64" in bench("--url", demo.url, "--adapters", "65", status=1).stderr
    assert "lists 0" in bench("--url", demo.url, "--adapters", "1", "--prefix", "none-",
                              status=1).stderr
    assert "LO:HI" not in bench("--help").stderr
    for bad in (["--rate", "x"], ["--input", "5:4"], ["--nonsense"], ["stray"], ["--alpha", "0"]):
        assert bench(*bad, status=2).stderr
    # a prompt past the context fails, is counted with the server's words, and shows in the status
    run = bench("--url", demo.url, "--requests", "2", "--rate", "100", "--input", "5000:5000",
                status=1)
    assert "error, 2 times: 400" in run.stdout


@pytest.mark.parametrize("descriptors", range(6, 14))
def test_few_descriptors(demo, descriptors):
    """Running out of descriptors is told, and is neither an abort nor a hang."""
    run = subprocess.run([BENCH, "--url", demo.url, "--concurrency", "1", "--requests", "3",
                          "--input", "2:4", "--output", "2:4"], capture_output=True, text=True,
                         timeout=60, preexec_fn=lambda: resource.setrlimit(
                             resource.RLIMIT_NOFILE, (descriptors, descriptors)))
    assert run.returncode in (0, 1) and (run.returncode == 0 or run.stderr + run.stdout), run


@pytest.mark.parametrize("kept", ("plain", "own"))
def test_roofline(tmp_path, monkeypatch, kept):
    monkeypatch.setenv("LORAD_CPU_LINEAR", kept)
    compact = kept == "own" and "avx512bw" in pathlib.Path("/proc/cpuinfo").read_text()
    (tmp_path / "config.json").write_text(json.dumps(ROOFLINE_MODEL))
    run = bench("roofline", "--model", str(tmp_path), "--batch", "1,30", "--rank", "9",
                "--json", str(tmp_path / "r.json"), "--svg", str(tmp_path / "r.svg"))
    result = json.loads((tmp_path / "r.json").read_text())
    assert [s["tokens"] for s in result["steps"]] == [1, 30]
    for step in result["steps"]:
        total, operations = step["step"], step["operations"]
        assert total["seconds"] == pytest.approx(sum(o["seconds"] for o in operations.values()),
                                                 rel=1e-5)  # six digits are written
        # by hand: 2 layers x (qkv 256 x 128 + o 128 x 128 + gate, up, down 3 x 256 x 128) + head
        weights = 2 * (256 * 128 + 128 * 128 + 3 * 256 * 128) + 512 * 128
        linear = {k: o for k, o in operations.items() if k.startswith("linear")}
        read = sum(o["bytes"] for o in linear.values())
        if compact:  # 12 bits, 32 bytes for each 16 rows, and 8 for each exception, of one in 64 at most
            rows = 2 * (256 + 128 + 2 * 256 + 128) + 512
            exceptions = (read - 1.5 * weights - 32 * rows / 16) / 8
            assert exceptions in range(weights // 64 + 1)
        else:
            assert read == 2 * weights
        assert sum(o["flops"] for o in linear.values()) == 2 * weights * step["tokens"]
        # A of q k v o gate up: in 128; down: 256. Two layers, rank 9, bf16.
        assert operations["lora shrink"]["bytes"] == step["tokens"] * 2 * 2 * 9 * (6 * 128 + 256)
    assert "GB/s" in run.stdout and (tmp_path / "r.svg").read_text().endswith("</svg>\n")
    bench("roofline", status=2)
