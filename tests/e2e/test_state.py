"""--state-dir: what was acknowledged is there after SIGKILL; what was refused changes nothing."""
import resource
import shutil
import threading

from server import Server
from test_admin import TINY, load, run, unload


def names(server):
    return [m["id"] for m in server.request("GET", "/v1/models")[1]["data"]][1:]


def kill(server):
    server.process.kill()
    server.process.wait(60)
    server.stop()


def dummy(seed):
    return f"dummy:rank=4,seed={seed},modules=all"


def test_killed_while_loading(tmp_path):
    """Every load that was answered with 200 is back, every unload stays; each with its weights."""
    state = ("--state-dir", str(tmp_path / "state"))
    server = Server(*state)
    for seed in range(20):
        assert load(server, f"a{seed}", dummy(seed))[0] == 200
    assert unload(server, "a3")[0] == 200
    assert server.request("DELETE", "/v1/adapters/a4")[0] == 200
    assert load(server, "a5", dummy(99), load_inplace=True)[0] == 200
    acknowledged = {f"a{seed}" for seed in range(20)} - {"a3", "a4"}
    digests = {name: server.request("GET", f"/v1/adapters/{name}")[1]["digest"]
               for name in acknowledged}

    def keep_loading(lane):
        try:
            for number in range(10000):
                if load(server, f"b{lane}.{number}", dummy(number))[0] == 200:
                    acknowledged.add(f"b{lane}.{number}")
        except OSError:
            pass
    lanes = [threading.Thread(target=keep_loading, args=(lane,)) for lane in range(2)]
    [lane.start() for lane in lanes]
    while len(acknowledged) < 60:
        assert any(lane.is_alive() for lane in lanes)
    server.process.kill()
    [lane.join() for lane in lanes]
    kill(server)
    server = Server(*state)
    there = set(names(server))
    # A load that was cut off between the disk and its answer may be there: one a lane at most.
    assert acknowledged <= there and len(there - acknowledged) <= 2
    assert there.isdisjoint({"a3", "a4"})
    for name, digest in digests.items():
        assert server.request("GET", f"/v1/adapters/{name}")[1]["digest"] == digest, name
    assert server.tokens(model="a5", prompt=[1, 2])
    assert server.stop() == 0


def test_failed_write_changes_nothing(tmp_path):
    server = Server("--state-dir", str(tmp_path / "state"))
    assert load(server, "kept", dummy(1))[0] == 200
    digest = server.request("GET", "/v1/adapters/kept")[1]["digest"]
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    for answer in (load(server, "new", dummy(2)), load(server, "kept", dummy(3), load_inplace=True),
                   unload(server, "kept"), server.request("DELETE", "/v1/adapters/kept")):
        assert answer[0] in (500, 507) and "--state-dir" in answer[1]["error"]["message"], answer
        assert str(tmp_path) not in answer[1]["error"]["message"]
    assert names(server) == ["kept"]
    assert server.request("GET", "/v1/adapters/kept")[1]["digest"] == digest
    assert server.tokens(model="kept", prompt=[1])
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    assert load(server, "new", dummy(2))[0] == 200
    kill(server)
    server = Server("--state-dir", str(tmp_path / "state"))
    assert names(server) == ["kept", "new"]
    assert server.stop() == 0


def test_folders_come_back_unless_they_changed(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    model = TINY[0].parents[1] if TINY[0].parent.name == "adapters" else TINY[0].parent
    options = ("--load-format", "dummy", "--adapter-dir", str(served), "--state-dir",
               str(tmp_path / "state"))
    server = Server(*options, model=model)
    for name in ("same", "changed", "gone"):
        shutil.copytree(TINY[0], served / name)
        assert load(server, "n-" + name, name)[0] == 200
    kill(server)
    weights = served / "changed/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8:] = bytes(8)
    weights.write_bytes(data)
    shutil.rmtree(served / "gone")
    server = Server(*options, model=model)
    assert names(server) == ["changed", "n-same", "same"]
    server.log.seek(0)
    log = server.log.read()
    assert "name=n-changed its files are not those" in log and "name=n-gone" in log
    assert server.tokens(model="n-same", prompt=[1], max_tokens=2)
    shutil.copytree(TINY[0], served / "gone")
    assert server.stop() == 0
    server = Server(*options, model=model)  # it was only absent, not forgotten
    assert names(server) == ["changed", "gone", "n-gone", "n-same", "same"]
    assert server.stop() == 0


def test_a_name_loaded_later_wins_over_the_command_line(tmp_path):
    options = ("--adapter", "x=" + dummy(1), "--state-dir", str(tmp_path / "state"))
    server = Server(*options)
    first = server.request("GET", "/v1/adapters/x")[1]["digest"]
    assert load(server, "x", dummy(2), load_inplace=True)[0] == 200
    second = server.request("GET", "/v1/adapters/x")[1]["digest"]
    assert server.stop() == 0
    server = Server(*options)
    assert server.request("GET", "/v1/adapters/x")[1]["digest"] == second != first
    assert unload(server, "x")[0] == 200
    assert server.stop() == 0
    server = Server(*options)
    assert server.request("GET", "/v1/adapters/x")[1]["digest"] == first
    assert server.stop() == 0


def test_one_server_a_folder(tmp_path):
    state = ("--state-dir", str(tmp_path / "state"))
    server = Server(*state)
    model = ("--model", server.folder.name + "/dummy", "--load-format", "dummy", "--port", "0")
    second = run(*model, *state)
    assert second.returncode == 1 and "another process" in second.stderr, second.stderr
    assert server.stop() == 0
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/registry.sqlite").write_bytes(b"not a database, and long enough " * 64)
    (tmp_path / "dummy").mkdir()
    shutil.copy(TINY[0].parents[1] / "config.json" if TINY[0].parent.name == "adapters"
                else TINY[0].parent / "config.json", tmp_path / "dummy")
    for folder, named in (("bad", "registry.sqlite"), ("missing/state", "missing/state")):
        result = run("--model", str(tmp_path / "dummy"), "--load-format", "dummy", "--state-dir",
                     str(tmp_path / folder))
        assert result.returncode == 1 and named in result.stderr, result.stderr
