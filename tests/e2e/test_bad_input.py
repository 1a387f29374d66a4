"""Bad parameters and bad HTTP: a clear error each, beside a live stream whose tokens do not
change."""
import json
import threading

import pytest

GOOD = {"model": "a", "prompt": [1, 2, 3], "max_tokens": 2}
BAD = [
    ({"model": None}, 400), ({"model": 5}, 400), ({"model": "../x"}, 404), ({"model": "no"}, 404),
    ({"prompt": None}, 400), ({"prompt": []}, 400), ({"prompt": ""}, 400), ({"prompt": {}}, 400),
    ({"prompt": "text"}, 400), ({"prompt": [-1]}, 400), ({"prompt": [512]}, 400),
    ({"prompt": [1.5]}, 400), ({"prompt": [[1], "x"]}, 400), ({"prompt": [1] * 2049}, 400),
    ({"prompt": [1] * 2040, "max_tokens": 100}, 400),
    ({"max_tokens": 0}, 400), ({"max_tokens": -1}, 400), ({"max_tokens": 1.0}, 400),
    ({"max_tokens": "5"}, 400), ({"max_tokens": 2**62}, 400), ({"max_tokens": 10**30}, 400),
    ({"n": 0}, 400), ({"n": 10**9}, 400), ({"n": 2, "best_of": 1}, 400), ({"best_of": 3}, 400),
    ({"temperature": -1}, 400), ({"temperature": 2.1}, 400), ({"temperature": "1"}, 400),
    ({"top_p": 0}, 400), ({"top_p": 1.5}, 400), ({"top_k": -2}, 400), ({"top_k": 513}, 400),
    ({"min_p": 2}, 400), ({"presence_penalty": 2.5}, 400), ({"frequency_penalty": -3}, 400),
    ({"seed": 1.5}, 400), ({"stop": ["a"] * 5}, 400), ({"stop": ""}, 400),
    ({"stop": "x" * 2**20}, 400), ({"stop": 7}, 400), ({"logit_bias": {"600": 1}}, 400),
    ({"logit_bias": {"1": 101}}, 400), ({"logit_bias": {"x": 1}}, 400),
    ({"logit_bias": {str(i): 0 for i in range(5000)}}, 400), ({"logprobs": 21}, 400),
    ({"logprobs": True}, 400), ({"stream": "true"}, 400),
    ({"stream_options": {"include_usage": True}}, 400), ({"tools": [{}]}, 400),
    ({"response_format": {"type": "json_object"}}, 400), ({"suffix": "x"}, 400),
    ({"lora": "a"}, 400), ({"lora": [{"id": "zz"}]}, 404), ({"lora": [{"id": "b"}] * 4}, 400),
    ({"adapter_id": "b"}, 400), ({"min_tokens": 3}, 400), ({"deadline_ms": 0}, 400),
]
BODIES = [b"", b"{", b"[]", b"nul", b'{"model":"a","model":"b","prompt":[1]}', b"\xef\xbb\xbf{}",
          b'{"model":"\\ud800"}', b'{"a":' * 2100 + b"1" + b"}" * 2100, b'{"n":1e999999999}',
          b'{"model":"a\\u0000b","prompt":[1]}']


@pytest.fixture
def live(dummy):
    """Runs a long request beside the test; its tokens must be those it has alone."""
    fields = dict(model="b", prompt=[3, 1, 4], max_tokens=300)
    alone = dummy.tokens(**fields)
    beside = []
    thread = threading.Thread(target=lambda: beside.append(dummy.tokens(**fields)))
    thread.start()
    yield
    thread.join()
    assert beside == [alone]


def check(status, answer, wanted):
    assert status == wanted, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 8


def test_parameters(dummy, live):
    for change, wanted in BAD:
        status, answer = dummy.complete(**{**GOOD, **change})
        check(status, answer, wanted)
    assert dummy.complete(**GOOD)[0] == 200


def test_bodies(dummy, live):
    for body in BODIES:
        check(*dummy.request("POST", "/v1/completions", body), 400)


def test_accepted(dummy):
    for change in ({"temperature": 1e-40}, {"temperature": None}, {"unknown": 1}, {"top_k": -1},
                   {"stop": ["a"] * 4}, {"user": "me"}, {"n": 3}):
        assert dummy.complete(**{**GOOD, **change})[0] == 200, change


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
HTTP = [  # bytes, status that must come first
    (b"GET /health HTTP/1.1\nHost: x\n\n", 400), (HEAD + b"A: b\0c\r\n\r\n", 400),
    (HEAD + b"A : b\r\n\r\n", 400), (HEAD + b": b\r\n\r\n", 400), (HEAD + b"A\r\n\r\n", 400),
    (HEAD + b"A: b\r\n c\r\n\r\n", 400), (b"GET /health HTTP/1.1\r\n A: b\r\n\r\n", 400),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    (POST + b"Content-Length: +2\r\n\r\n{}", 400), (POST + b"Content-Length: -1\r\n\r\n{}", 400),
    (POST + b"Content-Length: 0x2\r\n\r\n{}", 400), (POST + b"Content-Length: 2, 2\r\n\r\n", 400),
    (POST + b"Content-Length: \r\n\r\n{}", 400),
    (POST + b"Content-Length: 18446744073709551616\r\n\r\n{}", 400),
    (POST + b"Content-Length: 18446744073709551615\r\n\r\n{}", 413),
    (POST + b"Transfer-Encoding: identity\r\n\r\n{}", 400),
    (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n11111111111111111\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n", 413),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 100000 + b"\r\n{}\r\n", 400),
    (b"GET /health HTTP/1.2\r\nHost: x\r\n\r\n", 505), (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    (b"FROB /health HTTP/1.1\r\nHost: x\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    (b"GET /health HTTP/1.1\r\n\r\n", 400), (HEAD + b"Host: y\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (HEAD + b"A: " + b"b" * 100000 + b"\r\n\r\n", 431), (HEAD + b"A: b\r\n" * 5000 + b"\r\n", 431),
    (HEAD + b"Authorization: a\r\nAuthorization: b\r\n\r\n", 400),
    (HEAD + b"Content-Type: a\r\nContent-Type: b\r\n\r\n", 400),
    (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 405), (HEAD + b"Expect: more\r\n\r\n", 417),
    (b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400), (b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"PUT /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (POST + b"Content-Length: 10\r\n\r\n{}", 400),
    (POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", 415),
    (HEAD + b"Upgrade: h2c\r\nConnection: Upgrade, close\r\n\r\n", 200),
]


def test_http(dummy, live):
    wrong = []
    for data, wanted in HTTP:
        answer = dummy.raw(data)
        status = int(answer.split(b" ", 2)[1])
        if status not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            wrong.append((data[:80], wanted, answer[:300]))
    assert not wrong


def test_split_at_every_byte(dummy):
    body = json.dumps({**GOOD, "temperature": 0, "request_id": "same"}).encode()
    data = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def text(answer):
        return json.loads(answer.split(b"\r\n\r\n", 1)[1])["choices"]
    whole = text(dummy.raw(data))
    assert text(dummy.raw(data, pieces=[data[i:i + 1] for i in range(len(data))])) == whole
    for at in range(0, len(data), 7):
        assert text(dummy.raw(data, pieces=[data[:at], data[at:]])) == whole


def test_pipelined_in_order(dummy):
    body = json.dumps({**GOOD, "max_tokens": 30}).encode()
    first = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = dummy.raw(first + last)
    assert answer.index(b"text_completion") < answer.index(b'"version"')


def test_trailer_is_no_header(dummy):
    data = (POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\n{}\r\n0\r\n"
            b"Authorization: Bearer x\r\n\r\n")
    assert dummy.raw(data).startswith(b"HTTP/1.1 400")
