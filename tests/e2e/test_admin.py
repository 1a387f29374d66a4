"""Loading, unloading, keys, limits and the end of the process."""
import json
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest
from server import CONFIG, LORAD, ROOT, Server

TINY = sorted(p.parent for p in (ROOT / "tests/fixtures/models").rglob("adapter_config.json"))


def load(server, name, path, **more):
    return server.request("POST", "/v1/load_lora_adapter",
                          {"lora_name": name, "lora_path": path, **more})


def unload(server, name):
    return server.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})


def test_load_and_unload(dummy):
    source = "dummy:rank=4,seed=11,modules=all"
    assert load(dummy, "new", source) == (200, "Success: LoRA adapter 'new' added successfully.")
    first = dummy.tokens(model="new", prompt=[1, 2])
    assert load(dummy, "new", source)[0] == 409
    status, answer = load(dummy, "new", "dummy:rank=4,seed=12,modules=all", load_inplace=True)
    assert status == 200 and dummy.tokens(model="new", prompt=[1, 2]) != first
    assert dummy.request("GET", "/v1/adapters/new")[1]["rank"] == 4
    assert unload(dummy, "new")[0] == 200
    assert unload(dummy, "new")[0] == 404
    assert dummy.complete(model="new", prompt=[1])[0] == 404


@pytest.mark.parametrize("name", ["", "a/b", "x" * 300, "dummy", "..", "a\nb"])
def test_bad_names(dummy, name):
    assert load(dummy, name, "dummy:rank=4,seed=1,modules=all")[0] == 400


def test_bad_sources(dummy):
    for source in ("dummy:rank=0", "dummy:rank=257,seed=1,modules=all", "dummy:modules=x"):
        assert load(dummy, "bad", source)[0] == 400, source
    assert load(dummy, "bad", "/etc")[0] == 403
    assert dummy.request("GET", "/v1/adapters/bad")[0] == 404


def test_unload_in_flight_drains(dummy):
    load(dummy, "leaving", "dummy:rank=8,seed=21,modules=all")
    fields = dict(model="leaving", prompt=[5, 5], max_tokens=1900)
    alone, beside = dummy.tokens(**fields), []
    thread = threading.Thread(target=lambda: beside.append(dummy.tokens(**fields)))
    thread.start()
    dummy.wait_metric("vllm:num_requests_running", lambda v: v == 1)
    assert unload(dummy, "leaving")[0] == 200
    assert dummy.complete(model="leaving", prompt=[1])[0] == 404
    load(dummy, "leaving", "dummy:rank=8,seed=22,modules=all")  # another one under the same name
    other = dummy.tokens(**fields)
    thread.join()
    assert beside == [alone] and other != alone
    unload(dummy, "leaving")


def test_put(dummy):
    path = "/v1/adapters/put"
    source = {"path": "dummy:rank=4,seed=31,modules=qkvo"}
    status, checked = dummy.request("PUT", path, {**source, "dry_run": True})
    assert status == 200 and checked["dry_run"] and checked["rank"] == 4
    assert set(checked["modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert dummy.request("GET", path)[0] == 404
    status, made = dummy.request("PUT", path, source)
    assert status == 201 and made["digest"] == checked["digest"] and made["last_used"] is None
    begin = int(time.time())
    first = dummy.tokens(model="put", prompt=[1, 2])
    assert begin - 1 <= dummy.request("GET", path)[1]["last_used"] <= time.time() + 1
    other = {"path": "dummy:rank=5,seed=32"}
    assert dummy.request("PUT", path, {**other, "dry_run": True})[0] == 200
    assert dummy.tokens(model="put", prompt=[1, 2]) == first
    status, replaced = dummy.request("PUT", path, other)
    assert status == 200 and replaced["generation"] > made["generation"]
    assert dummy.tokens(model="put", prompt=[1, 2]) != first
    for body in ({}, {"path": ""}, {"path": 1}, {**source, "pinned": 1},
                 {**source, "dry_run": "yes"}, {"path": "dummy:rank=0"}):
        assert dummy.request("PUT", path, body)[0] == 400, body
    assert dummy.request("PUT", "/v1/adapters/dummy", source)[0] == 400  # the base model's name
    assert dummy.request("GET", path)[1]["digest"] == replaced["digest"]
    assert dummy.request("DELETE", path + "?mode=never")[0] == 400
    assert dummy.request("DELETE", path + "?mode=drain")[0] == 200
    assert dummy.request("DELETE", path)[0] == 404


def test_delete_by_force_ends_its_requests_alone(dummy):
    load(dummy, "forced", "dummy:rank=8,seed=41,modules=all")
    stays = dict(model="a", prompt=[5, 5], max_tokens=1500)
    alone, beside, ended = dummy.tokens(**stays), [], []

    def ask():
        ended.append(dummy.complete(model="forced", prompt=[5], max_tokens=1900, ignore_eos=True))
    threads = [threading.Thread(target=lambda: beside.append(dummy.tokens(**stays))),
               threading.Thread(target=ask)]
    [thread.start() for thread in threads]
    dummy.wait_metric("vllm:num_requests_running", lambda v: v == 2)
    assert dummy.request("DELETE", "/v1/adapters/forced?mode=force")[0] == 200
    [thread.join() for thread in threads]
    assert beside == [alone]
    assert ended[0][0] == 404 and "by force" in ended[0][1]["error"]["message"], ended
    assert dummy.complete(model="forced", prompt=[1])[0] == 404


def test_paths_stay_inside_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    model = TINY[0].parents[1] if TINY[0].parent.name == "adapters" else TINY[0].parent
    shutil.copytree(TINY[0], root / "good")
    shutil.copytree(TINY[0], outside)
    (root / "link").symlink_to(outside)
    (root / "file").mkdir()
    shutil.copy(TINY[0] / "adapter_config.json", root / "file")
    (root / "file/adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "fifo").mkdir()
    shutil.copy(TINY[0] / "adapter_config.json", root / "fifo")
    os.mkfifo(root / "fifo/adapter_model.safetensors")
    (root / "empty").mkdir()
    (root / "plain").write_text("x")
    (tmp_path / "served").mkdir()
    server = Server("--load-format", "dummy", "--adapter-dir", str(tmp_path / "served"), model=model)
    try:
        for entry in root.iterdir():
            entry.rename(tmp_path / "served" / entry.name)
        cases = [("good", 200), (str(tmp_path / "served/good"), 200), ("../outside", 403),
                 (str(outside), 403), ("link", 403), ("file", 403), ("good/../../outside", 403),
                 ("missing", 404), ("plain", 400), ("empty", 400), ("fifo", 400)]
        for number, (path, wanted) in enumerate(cases):
            status, answer = load(server, f"n{number}", path)
            assert status == wanted, (path, answer)
            assert status == 200 or str(tmp_path) not in json.dumps(answer)
        names = [m["id"] for m in server.request("GET", "/v1/models")[1]["data"]]
        assert names[1:] == ["n0", "n1"]
        assert server.tokens(model="n0", prompt=[1], max_tokens=2)
    finally:
        assert server.stop() == 0


def test_keys(tmp_path):
    (tmp_path / "api").write_text("user-key\n\nother\n")
    (tmp_path / "admin").write_text("admin-key\n")
    server = Server("--api-key-file", str(tmp_path / "api"), "--admin-key-file",
                    str(tmp_path / "admin"), "--adapter", "a=dummy:rank=4,seed=1,modules=all")
    body = {"model": "a", "prompt": [1], "max_tokens": 1}
    admin = {"lora_name": "n", "lora_path": "dummy:rank=4,seed=2,modules=all"}
    cases = [(None, 401, 401), ("wrong", 401, 401), ("user-ke", 401, 401), ("user-key", 200, 403),
             ("other", 200, 403), ("admin-key", 200, 200)]
    for key, user_status, admin_status in cases:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert server.request("POST", "/v1/completions", body, headers)[0] == user_status, key
        assert server.request("POST", "/v1/load_lora_adapter", admin, headers)[0] == admin_status
    assert server.request("GET", "/health")[0] == 200
    assert server.stop() == 0


def test_queue_full_is_429():
    server = Server("--max-seqs", "1", "--max-queue", "2")
    answers = []

    def ask():
        connection = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({"model": "dummy", "prompt": [1], "max_tokens": 1500,
                           "ignore_eos": True, "stream": True}).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                           % len(body) + body)
        answers.append(connection)
    for _ in range(12):
        ask()
    heads = [c.recv(400) for c in answers[-4:]]
    refused = [h for h in heads if h.startswith(b"HTTP/1.1 429")]
    assert refused and all(b"Retry-After: " in h for h in refused)
    [c.close() for c in answers]
    server.wait_metric("vllm:num_requests_running", lambda v: v == 0)
    assert server.stop() == 0


def test_deadline():
    server = Server("--max-seqs", "1")
    status, answer = server.complete(model="dummy", prompt=[1], max_tokens=2000, ignore_eos=True,
                                     deadline_ms=1)
    assert status == 504, answer
    assert server.stop() == 0


def test_sigterm_drains():
    server = Server()
    answer = []
    thread = threading.Thread(target=lambda: answer.append(server.tokens(
        model="dummy", prompt=[1], max_tokens=1500)))
    thread.start()
    server.wait_metric("vllm:num_requests_running", lambda v: v == 1)
    server.process.terminate()
    refused = None
    while thread.is_alive() and refused is None:
        try:
            status, _ = server.complete(model="dummy", prompt=[1])
            refused = status if status == 503 else None
        except OSError:
            break
    thread.join()
    assert len(answer[0]) == 1500 and refused == 503
    assert server.process.wait(30) == 0
    server.stop()


def test_slow_request_is_408():
    server = Server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=50) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        begin = time.monotonic()
        assert sock.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begin < 40
    assert server.stop() == 0


def run(*arguments):
    return subprocess.run([LORAD, "serve", *arguments], capture_output=True, text=True, timeout=60)


def test_start_errors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = ("--model", str(tmp_path), "--load-format", "dummy", "--port", "0")
    taken = socket.create_server(("127.0.0.1", 0))
    cases = [((), "--model"), (("--model", "/nowhere"), "config.json"),
             (("--model", str(tmp_path)), "safetensors"), ((*model, "--frob", "1"), "--frob"),
             ((*model, "--port", "99999"), "--port"), ((*model, "--pool-bytes", "1XB"), "pool-bytes"),
             ((*model, "--port", str(taken.getsockname()[1])), "--port"),
             ((*model, "--adapter", "x=/nowhere"), "'x'"), ((*model, "--adapter", "x"), "NAME=DIR"),
             ((*model, "--device", "cuda"), "cuda"), ((*model, "--host", "nohost"), "--host"),
             ((*model, "--api-key-file", "/nowhere"), "nowhere")]
    for arguments, named in cases:
        result = run(*arguments)
        assert result.returncode == 1 and named in result.stderr, (arguments, result.stderr)
    taken.close()
    assert "--max-seqs" in run("--help").stdout
