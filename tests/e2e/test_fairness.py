"""A tenant that floods does not hold up a polite one: its request is served among the next, while
the flood still waits. Tenants are users, or keys where there are keys."""
import concurrent.futures

import pytest
from server import Server

FLOOD = 24


def flood_and_ask(server, flood, polite, headers=lambda who: {}):
    def ask(who, tokens):
        status, answer = server.request(
            "POST", "/v1/completions",
            {"model": "dummy", "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0,
             "ignore_eos": True, "user": who}, headers(who))
        assert status == 200, answer
        return answer["usage"]["completion_tokens"]

    pool = concurrent.futures.ThreadPoolExecutor(FLOOD)
    for _ in range(FLOOD):  # long, so that nearly all still wait when the polite one is done
        pool.submit(ask, flood, 1900)
    server.wait_metric("vllm:num_requests_waiting", lambda v: v >= FLOOD - 4)
    assert ask(polite, 5) == 5
    # in order of arrival all of the flood would have been before it
    waiting = server.metric("vllm:num_requests_waiting")
    assert any(line.startswith("lorad_tenant_tokens_total") and 'kind="generated"} 5' in line
               for line in server.request("GET", "/metrics")[1].splitlines())
    server.process.kill()  # the flood has served its purpose
    pool.shutdown()
    server.stop()
    return waiting


def test_users():
    server = Server("--max-seqs", "2", "--tenant-weight", "other=3")
    assert flood_and_ask(server, "flood", "polite") >= FLOOD / 2


def test_keys_not_users(tmp_path):
    (tmp_path / "keys").write_text("first\nsecond\n")
    server = Server("--max-seqs", "2", "--api-key-file", str(tmp_path / "keys"))
    keys = {"a": "first", "b": "second"}
    waiting = flood_and_ask(server, "a", "b",
                            lambda who: {"Authorization": f"Bearer {keys[who]}"})
    assert waiting >= FLOOD / 2


@pytest.mark.parametrize("value", ["x", "=2", "a=", "a=0", "a=-1", "a=nan", "a=2x", "a=1e9"])
def test_bad_weights(value):
    with pytest.raises(RuntimeError, match="NAME=W"):
        Server("--tenant-weight", value)
