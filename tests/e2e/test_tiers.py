"""Adapters that are registered by their headers alone, come when asked for, and go again."""
import shutil
import time

import pytest
from server import LORAD, ROOT, Server
from test_admin import load


def adapter(server, name):
    return server.request("GET", f"/v1/adapters/{name}")[1]


def digested(server, name):
    """Asks for the adapter until its digest is known: the server takes it when it has nothing else to do."""
    deadline = time.monotonic() + 20
    while not (answer := adapter(server, name))["digest"]:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return answer


def test_registered_on_disk_comes_when_asked_for():
    options = []
    for i in range(40):
        options += ["--adapter", f"a{i}=dummy:rank=8,seed={i},modules=all"]
    one = Server("--adapter", "x=dummy:rank=8,seed=1,modules=all")
    size = adapter(one, "x")["bytes"]
    alone = one.tokens(model="x", prompt=[7, 8, 9])
    one.stop()
    server = Server(*options, "--host-bytes", str(5 * size))
    assert adapter(server, "a7")["tier"] == "disk" and adapter(server, "a7")["digest"] is None
    assert server.metric("lorad_adapter_reads_total") == 0
    for i in range(40):
        server.tokens(model=f"a{i}", prompt=[7, 8, 9])
    assert server.tokens(model="a1", prompt=[7, 8, 9]) == alone
    assert adapter(server, "a7")["tier"] == "device"
    assert len(adapter(server, "a7")["digest"]) == 64
    assert server.metric("lorad_host_bytes") <= 5 * size
    assert server.metric("lorad_host_images") == 5
    assert server.stop() == 0


def test_pin_and_prefetch(tmp_path):
    state = ("--state-dir", str(tmp_path / "state"))
    server = Server(*state)
    for name in ("a", "b"):
        assert load(server, name, "dummy:rank=8,seed=3,modules=all")[0] == 200
    status, answer = server.request("POST", "/v1/adapters/a/pin")
    assert status == 200 and answer["pinned"] is True
    assert server.request("POST", "/v1/adapters/b/prefetch")[0] == 200
    server.wait_metric("lorad_adapters_resident", lambda v: v == 2)
    assert server.request("POST", "/v1/adapters/none/pin")[0] == 404
    assert server.request("POST", "/v1/adapters/a/eat")[0] == 404
    server.process.kill()
    server.process.wait(60)
    server.stop()
    server = Server(*state)  # the pin is remembered, and brings the adapter
    server.wait_metric("lorad_adapters_resident", lambda v: v == 1)
    assert adapter(server, "a")["pinned"] is True and adapter(server, "a")["tier"] == "device"
    assert server.request("POST", "/v1/adapters/a/unpin")[1]["pinned"] is False
    assert server.stop() == 0


@pytest.mark.parametrize("harm", ["gone", "truncated", "noise"])
def test_files_that_change_after_registration(tmp_path, harm):
    """Who needs them gets a clear error, others their answers; once they are back, so is it."""
    root = tmp_path / "adapters"
    shutil.copytree(ROOT / "demo" / "adapters", root)
    names = sorted(p.name for p in root.iterdir() if p.is_dir())
    server = Server("--adapter-dir", str(root), model=ROOT / "demo" / "model")
    weights = root / names[0] / "adapter_model.safetensors"
    saved = weights.read_bytes()
    if harm == "gone":
        weights.unlink()
    elif harm == "truncated":
        weights.write_bytes(saved[:-10])
    else:
        weights.write_bytes(saved[:-64] + b"\xff" * 64)  # NaN, whatever the type
    status, answer = server.complete(model=names[0], prompt="In the", max_tokens=2)
    assert status == 500 and "adapter_model" in answer["error"]["message"], answer
    assert str(tmp_path) not in answer["error"]["message"]
    assert server.complete(model=names[1], prompt="In the", max_tokens=2)[0] == 200
    assert adapter(server, names[0])["tier"] == "disk"
    weights.write_bytes(saved)
    assert server.complete(model=names[0], prompt="In the", max_tokens=2)[0] == 200
    assert server.metric("lorad_adapter_read_failures_total") == 1
    assert server.stop() == 0


def test_prefix_hits_in_usage():
    server = Server("--adapter", "a=dummy:rank=8,seed=1,modules=all")
    prompt = list(range(2, 102))
    fields = dict(prompt=prompt, max_tokens=4, temperature=0, return_token_ids=True)

    def ask(**more):
        status, answer = server.complete(**fields, **more)
        assert status == 200
        return (answer["choices"][0]["token_ids"],
                answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    first, cached = ask(model="a")
    assert cached == 0
    assert ask(model="a") == (first, 96)
    assert ask(model="dummy")[1] == 0
    assert ask(model="a", user="somebody")[1] == 0
    assert ask(model="a", cache_salt="mine")[1] == 0
    assert ask(model="a", cache_salt="mine") == (first, 96)
    assert server.metric("vllm:prefix_cache_hits_total") == 192
    assert server.stop() == 0
    server = Server("--adapter", "a=dummy:rank=8,seed=1,modules=all", "--prefix-cache", "0")
    assert ask(model="a") == (first, 0) and ask(model="a") == (first, 0)
    assert server.stop() == 0


def test_ten_thousand_are_registered_at_once():
    options = []
    for i in range(10000):
        options += ["--adapter", f"a{i:05d}=dummy:rank={8 << i % 4},seed={i},modules=all"]
    few = Server(*options[:20])
    begin = time.monotonic()
    many = Server(*options)
    assert time.monotonic() - begin < 20

    def resident_kib(server):
        with open(f"/proc/{server.process.pid}/status", encoding="utf-8") as file:
            return int(next(line for line in file if line.startswith("VmRSS")).split()[1])
    each = (resident_kib(many) - resident_kib(few)) / 9990
    print(f"{each:.2f} KiB an adapter")
    with open(LORAD, "rb") as file:
        sanitized = b"__asan_init" in file.read()  # then memory has shadows
    assert sanitized or each < 1 + 0.1  # the command line is held, too: 0.05 KiB each
    assert many.tokens(model="a00003", prompt=[1]) == few.tokens(model="a00003", prompt=[1])
    assert len(many.request("GET", "/v1/models")[1]["data"]) == 10001
    assert few.stop() == 0 and many.stop() == 0


@pytest.fixture
def copies(tmp_path):
    """Two folders of the same content, and one of other content."""
    for name, source in (("one", "kjv"), ("two", "kjv"), ("other", "law")):
        shutil.copytree(ROOT / "demo/adapters" / source, tmp_path / name)
    return tmp_path


def test_equal_content_shares_pages(copies):
    server = Server("--adapter-dir", str(copies), model=ROOT / "demo/model")
    ask = {"prompt": "3:1 And it came to pass", "max_tokens": 24}
    wanted = server.tokens(model="one", **ask)
    assert server.tokens(model="two", **ask) == wanted  # each read for itself: only now known as one
    assert server.tokens(model="other", **ask) != wanted
    shares = {name: digested(server, name)["pages_of"] for name in ("one", "two", "other")}
    assert shares == {"one": None, "two": "one", "other": None}
    requests = adapter(server, "two")["requests"]
    assert server.tokens(model="two", **ask) == wanted
    assert adapter(server, "two")["requests"] == requests + 1  # counted under its own name
    assert server.request("POST", "/v1/unload_lora_adapter", {"lora_name": "one"})[0] == 200
    assert adapter(server, "two")["pages_of"] is None
    assert server.tokens(model="two", **ask) == wanted
    assert server.stop() == 0


def test_twin_whose_files_are_gone(copies):
    probe = Server("--adapter-dir", str(copies), model=ROOT / "demo/model")
    ask = {"prompt": "3:1 And it came to pass", "max_tokens": 8}
    wanted = probe.tokens(model="one", **ask)
    larger = max((adapter(probe, name) for name in ("one", "other")), key=lambda a: a["pages"])
    page_bytes = 64 * 2 ** 20 // probe.metric("lorad_pages_total")
    probe.stop()
    # Room for one adapter in host memory and in the pool: `other` drives `one` out of both.
    server = Server("--adapter-dir", str(copies), "--host-bytes", str(larger["bytes"]),
                    "--prefix-cache", "0", "--pool-bytes",
                    str(int(page_bytes) * (larger["pages"] + 3)), model=ROOT / "demo/model")
    for name in ("one", "two", "one"):
        assert server.tokens(model=name, **ask) == wanted
        digested(server, name)
    assert adapter(server, "two")["pages_of"] == "one"
    shutil.rmtree(copies / "one")
    assert server.complete(model="other", prompt="We the people", max_tokens=2)[0] == 200
    assert adapter(server, "one")["tier"] == "disk"
    assert server.tokens(model="two", **ask) == wanted
    assert server.metric("lorad_adapter_read_failures_total") == 1
    assert server.stop() == 0
