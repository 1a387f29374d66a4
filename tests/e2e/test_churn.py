"""10,000 loads and unloads leave nothing behind: descriptors, memory and pages stay flat."""
import http.client
import json
import os
import pathlib
import shutil

from server import Server
from test_admin import TINY

CYCLES, WARM = 10000, 2000


def held(server):
    process = pathlib.Path(f"/proc/{server.process.pid}")
    rss_pages = int((process / "statm").read_text().split()[1])
    return len(os.listdir(process / "fd")), rss_pages * os.sysconf("SC_PAGE_SIZE")


def test_churn(tmp_path):
    """Folders and dummies in turn; each tenth runs, so that it has pages when it is unloaded."""
    (tmp_path / "served").mkdir()
    model = TINY[0].parents[1] if TINY[0].parent.name == "adapters" else TINY[0].parent
    server = Server("--load-format", "dummy", "--adapter-dir", str(tmp_path / "served"), model=model)
    shutil.copytree(TINY[0], tmp_path / "served/folder")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def post(path, **body):
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
    for cycle in range(CYCLES):
        if cycle == WARM:
            fds, bytes_before = held(server)
        source = "folder" if cycle % 2 else f"dummy:rank=4,seed={cycle}"
        post("/v1/load_lora_adapter", lora_name=f"n{cycle}", lora_path=source)
        if cycle % 10 < 2:
            post("/v1/completions", model=f"n{cycle}", prompt=[1], max_tokens=1)
        post("/v1/unload_lora_adapter", lora_name=f"n{cycle}")
    fds_after, bytes_after = held(server)
    assert fds_after == fds
    # One image kept a cycle would be several times this.
    assert bytes_after - bytes_before < 8 << 20, (bytes_before, bytes_after)
    server.wait_metric('lorad_adapters_resident', lambda v: v == 0)
    for owner in ("kv", "adapter", "cached"):
        server.wait_metric(f'lorad_pages{{owner="{owner}"}}', lambda v: v == 0)
    assert len(server.request("GET", "/v1/models")[1]["data"]) == 1
    connection.close()
    assert server.stop() == 0
