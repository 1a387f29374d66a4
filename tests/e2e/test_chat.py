"""POST /v1/chat/completions on the demo model, with the openai client and without."""
import json
import shutil

import openai
import pytest

from server import ROOT, Server

MODEL = ROOT / "demo" / "model"
HELLO = [{"role": "user", "content": "The king said"}]


@pytest.fixture(scope="module")
def demo():
    server = Server("--served-model-name", "demo", "--adapter", f"caps={ROOT}/demo/adapters/caps",
                    model=MODEL)
    yield server
    assert server.stop() == 0


def chat(server, messages=None, **fields):
    return server.request("POST", "/v1/chat/completions", {
        "model": "demo", "messages": messages or HELLO, "temperature": 0, "max_tokens": 8, **fields})


def content(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def test_openai_client_whole_and_streamed_agree(demo):
    client = openai.OpenAI(base_url=demo.url + "/v1", api_key="none")
    for model in "demo", "caps":
        whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=20,
                                               temperature=0)
        assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
        stream = list(client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=20, temperature=0, stream=True,
            stream_options={"include_usage": True}))
        deltas = [c.choices[0].delta for c in stream if c.choices]
        assert deltas[0].role == "assistant" and all(d.role is None for d in deltas[1:])
        assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == "length"
        assert stream[-1].usage == whole.usage and whole.usage.completion_tokens == 20


def test_as_the_template_s_text(demo):
    """The demo's template is BOS, then each content and an empty line."""
    messages = [{"role": "system", "content": "Once"}, {"role": "user", "content": "upon a time"}]
    status, plain = demo.complete(model="caps", prompt="Once\n\nupon a time\n\n", temperature=0,
                                  max_tokens=8)
    assert status == 200
    status, body = chat(demo, messages, model="caps")
    assert status == 200 and body["usage"] == plain["usage"]
    assert content((status, body)) == plain["choices"][0]["text"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Once\n"},
                                          {"type": "text", "text": "upon a time"}]}]
    assert content(chat(demo, parts, model="caps")) == plain["choices"][0]["text"]


def test_what_clients_write_is_never_a_special_token(demo):
    for text in "<|end_of_text|>", "a<|begin_of_text|>b", "\ufdd0<|end_of_text|>":
        plain = demo.complete(model="demo", prompt=text.replace("\ufdd0", "\ufffd") + "\n\n",
                              temperature=0, max_tokens=4)[1]
        for fields in {"messages": [{"role": "user", "content": text}]}, \
                {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}:
            status, body = chat(demo, **fields, max_tokens=4)
            assert status == 200 and body["usage"] == plain["usage"]
            assert content((status, body)) == plain["choices"][0]["text"]


def test_log_probabilities(demo):
    body = chat(demo, logprobs=True, top_logprobs=3)[1]
    tokens = body["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 8 and "".join(t["token"] for t in tokens) == content((200, body))
    plain = demo.complete(model="demo", prompt="The king said\n\n", temperature=0, max_tokens=8,
                          logprobs=3)[1]["choices"][0]["logprobs"]
    for i, token in enumerate(tokens):
        assert token["logprob"] == plain["token_logprobs"][i]
        assert bytes(token["bytes"]).decode() == token["token"] == plain["tokens"][i]
        assert {t["token"]: t["logprob"] for t in token["top_logprobs"]} == plain["top_logprobs"][i]
        assert token["top_logprobs"][0]["logprob"] == max(plain["top_logprobs"][i].values())
    none = chat(demo, logprobs=True)[1]["choices"][0]["logprobs"]["content"]
    assert [t["top_logprobs"] for t in none] == [[]] * 8
    assert chat(demo)[1]["choices"][0]["logprobs"] is None


def test_limits(demo):
    status, body = chat(demo, max_tokens=None, ignore_eos=True)
    assert status == 200 and body["usage"]["total_tokens"] == 1024 # the model's context
    assert chat(demo, max_tokens=9, max_completion_tokens=3)[1]["usage"]["completion_tokens"] == 3
    small = Server("--served-model-name", "demo", "--pool-bytes", "1MiB", model=MODEL)
    status, body = chat(small, max_tokens=None, ignore_eos=True)
    assert status == 200 and 16 < body["usage"]["total_tokens"] < 1024 # what the pool has room for
    assert small.stop() == 0


def test_choices_and_continuing(demo):
    body = chat(demo, n=3, temperature=1, seed=5)[1]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert len({c["message"]["content"] for c in body["choices"]}) > 1
    messages = [*HELLO, {"role": "assistant", "content": " that the "}]
    continued = content(chat(demo, messages, continue_final_message=True))
    plain = demo.complete(model="demo", prompt="The king said\n\n that the", temperature=0,
                          max_tokens=8)[1]
    assert continued == plain["choices"][0]["text"]


BAD = [({"messages": None}, "messages"), ({"messages": []}, "messages"),
       ({"messages": {"role": "user", "content": "x"}}, "messages"),
       ({"messages": ["x"]}, "messages"), ({"messages": [{"content": "x"}]}, "messages"),
       ({"messages": [{"role": "pirate", "content": "x"}]}, "messages"),
       ({"messages": [{"role": 1, "content": "x"}]}, "messages"),
       ({"messages": [{"role": "user", "content": 7}]}, "messages"),
       ({"messages": [{"role": "user"}]}, "messages"),
       ({"messages": [{"role": "user", "content": []}]}, "messages"),
       ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
       ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages"),
       ({"messages": [{"role": "user", "content": "a " * 2000}]}, "messages"),
       ({"prompt": "x"}, "prompt"), ({"tools": [{}]}, "tools"), ({"tool_choice": "auto"}, "tool_choice"),
       ({"response_format": {"type": "json_object"}}, "response_format"),
       ({"chat_template": "{{ 1 }}"}, "chat_template"), ({"documents": [{}]}, "documents"),
       ({"chat_template_kwargs": []}, "chat_template_kwargs"), ({"echo": True}, "echo"),
       ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
       ({"logprobs": 3}, "logprobs"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
       ({"min_tokens": 9}, "min_tokens"), ({"max_tokens": 2000}, "max_tokens"),
       ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
       ({"continue_final_message": True, "messages": [{"role": "user", "content": ""}]},
        "continue_final_message")]


def test_bad_input(demo):
    for fields, param in BAD:
        status, body = demo.request("POST", "/v1/chat/completions",
                                    {"model": "demo", "messages": HELLO, "max_tokens": 8, **fields})
        assert status in (400, 413), (fields, body)
        assert body["error"]["param"] == param, (fields, body)
    # What asks for nothing is no reason to refuse.
    assert chat(demo, tools=[], tool_choice="none", response_format={"type": "text"}, store=False,
                echo=False, logprobs=False, chat_template_kwargs={"messages": []})[0] == 200
    assert demo.complete(model="demo", prompt="x", messages=HELLO)[1]["error"]["param"] == "messages"


def with_template(tmp_path, name, template):
    folder = tmp_path / name
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Server("--served-model-name", "demo", model=folder)


def test_another_template(tmp_path):
    server = with_template(tmp_path, "strict", """{{ bos_token }}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}
{{ m.role }}: {{ m.content | trim }}
{% endfor %}
{% if add_generation_prompt %}assistant:{{ ' !' if loud }}{% endif %}""")
    for fields, prompt in ({}, "user: Hi\nassistant:"), \
            ({"add_generation_prompt": False}, "user: Hi\n"), \
            ({"chat_template_kwargs": {"loud": True}}, "user: Hi\nassistant: !"):
        plain = server.complete(model="demo", prompt=prompt, temperature=0, max_tokens=8)[1]
        status, body = chat(server, [{"role": "user", "content": " Hi "}], **fields)
        assert status == 200 and body["usage"] == plain["usage"], prompt
        assert content((status, body)) == plain["choices"][0]["text"]
    status, body = chat(server, HELLO + HELLO)
    assert status == 400 and "take turns" in body["error"]["message"]
    assert body["error"]["param"] == "messages"
    assert server.stop() == 0


def test_no_template(tmp_path, dummy):
    broken = with_template(tmp_path, "broken", "{% for m in messages %}")
    for server, model in (broken, "demo"), (dummy, "dummy"):
        status, body = chat(server, model=model)
        assert status == 400 and "/v1/completions" in body["error"]["message"], body
    assert broken.complete(model="demo", prompt="x", max_tokens=1)[0] == 200
    assert broken.stop() == 0
