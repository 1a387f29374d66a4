"""Loads, replacements, requests and forced unloads of the same few names from six clients at once.

For data races, build with -DLORAD_SANITIZE=thread and set LORAD to that program: a report makes it
exit non-zero."""
import threading

from server import Server

ALLOWED = {"put": {200, 201, 409}, "complete": {200, 404}, "delete": {200, 404, 409}}


def test_put_complete_and_force_at_once(tmp_path):
    server = Server("--state-dir", str(tmp_path / "state"), "--threads", "1")
    seen = []

    def client(lane):
        for turn in range(40):
            name = f"n{(turn + lane) % 3}"
            path = f"/v1/adapters/{name}"
            seen.append(("put", *server.request("PUT", path, {"path": f"dummy:rank=4,seed={turn}"})))
            seen.append(("complete", *server.complete(model=name, prompt=[1, 2], max_tokens=20,
                                                      ignore_eos=True)))
            seen.append(("delete", *server.request("DELETE", path + "?mode=force")))
    lanes = [threading.Thread(target=client, args=(lane,)) for lane in range(6)]
    [lane.start() for lane in lanes]
    [lane.join() for lane in lanes]
    assert len(seen) == 6 * 40 * 3
    wrong = [entry for entry in seen if entry[1] not in ALLOWED[entry[0]]]
    assert not wrong, wrong[:3]
    for entry in seen:  # whoever was served got all of its tokens
        if entry[:2] == ("complete", 200):
            assert entry[2]["usage"]["completion_tokens"] == 20
    for name in ("n0", "n1", "n2"):
        server.request("DELETE", f"/v1/adapters/{name}")
    for owner in ("kv", "adapter", "cached"):
        server.wait_metric(f'lorad_pages{{owner="{owner}"}}', lambda v: v == 0)
    assert server.stop() == 0
