"""Activated LoRA: adapters that change only the tokens from their invocation on, against PEFT
(tests/reference/make_alora_goldens.py), and the prompt before it shared with the base model."""
import json
import shutil

import pytest
from server import ROOT, Server

GOLDENS = json.loads((ROOT / "tests/fixtures/demo/alora.json").read_text())


def configure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def adapters(tmp_path):
    for name in ("kjv", "law"):
        shutil.copytree(ROOT / "demo/adapters" / name, tmp_path / name)
        configure(tmp_path / name, alora_invocation_tokens=GOLDENS["invocation"])
    return tmp_path


def check(server, case):
    status, answer = server.complete(model=case["adapter"], prompt=case["prompt"], max_tokens=24,
                                     temperature=0, ignore_eos=True, return_token_ids=True,
                                     echo=True, logprobs=0)
    assert status == 200, answer
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"][1:len(case["prompt"])]
    worst = max(abs(a - b) for a, b in zip(logprobs, case["logprobs"]))
    assert worst < 1e-4, (case["adapter"], worst)
    assert server.tokens(model=case["adapter"], prompt=case["prompt"], max_tokens=24) \
        == case["tokens"]


@pytest.mark.parametrize("options", [(), ("--max-step-tokens", "7", "--prefix-cache", "0"),
                                     ("--preempt-every", "3")])
def test_as_peft(adapters, options):
    server = Server("--adapter-dir", str(adapters), "--dtype", "f32", *options,
                    model=ROOT / "demo/model")
    for _ in range(2):  # the second time out of the prefix cache
        for case in GOLDENS["cases"]:
            check(server, case)
    assert server.stop() == 0


def test_prompt_is_shared_with_the_base(adapters):
    shutil.copytree(ROOT / "demo/adapters/kjv", adapters / "plain")
    server = Server("--adapter-dir", str(adapters), "--dtype", "f32", model=ROOT / "demo/model")
    case = GOLDENS["cases"][0]
    before = len(case["prompt"]) - len(GOLDENS["invocation"])

    def cached(model, prompt):
        status, answer = server.complete(model=model, prompt=prompt, max_tokens=2, temperature=0)
        assert status == 200, answer
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached("model", case["prompt"]) == 0
    assert cached("kjv", case["prompt"]) == before // 16 * 16  # what the base computed
    assert cached("law", case["prompt"]) == before // 16 * 16
    assert cached("law", case["prompt"] + [5]) >= before // 16 * 16
    assert cached("plain", case["prompt"]) == 0  # one that changes every token shares nothing
    assert cached("model", case["prompt"]) == (len(case["prompt"]) - 1) // 16 * 16
    for other in GOLDENS["cases"]:
        check(server, other)
    assert server.stop() == 0


@pytest.mark.parametrize("tokens", [["x"], [-1], "text", [1.5], [1] * 33, {"a": 1}])
def test_bad_invocation_is_refused(adapters, tokens):
    configure(adapters / "law", alora_invocation_tokens=tokens)
    server = Server("--adapter-dir", str(adapters / "kjv"), model=ROOT / "demo/model")
    shutil.copytree(adapters / "law", adapters / "kjv" / "bad")
    status, answer = server.request("POST", "/v1/load_lora_adapter",
                                    {"lora_name": "bad", "lora_path": str(adapters / "kjv/bad")})
    assert status == 400 and "alora_invocation_tokens" in str(answer), (status, answer)
    assert server.stop() == 0
