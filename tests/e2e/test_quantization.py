"""The base model's weights in 8 and 4 bits: what it says of a text changes a little, and is steady."""
import pytest
from server import ROOT, Server

TEXT = ("The young lady was seated in the drawing-room, and her mother, who had been for some time "
        "silent, now observed that the weather was too fine to be lost, and that a walk to the "
        "village would do them all good. Nobody objected, and they set out together.")


def nll(server, model):
    """Mean negative log-probability of the text's tokens."""
    status, answer = server.complete(model=model, prompt=TEXT, max_tokens=0, echo=True, logprobs=0)
    assert status == 200, answer
    values = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return -sum(values) / len(values)


@pytest.fixture(scope="module")
def plain():
    server = Server("--adapter-dir", str(ROOT / "demo/adapters"), model=ROOT / "demo/model")
    values = {model: nll(server, model) for model in ("model", "kjv")}
    server.stop()
    return values


@pytest.mark.parametrize("quantization, bound", [("int8", 0.01), ("int4", 0.1)])
def test_perplexity_stays_near(plain, quantization, bound):
    server = Server("--adapter-dir", str(ROOT / "demo/adapters"), "--quantization", quantization,
                    model=ROOT / "demo/model")
    for model, value in plain.items():
        rounded = nll(server, model)
        assert rounded != value and abs(rounded - value) < bound
        assert nll(server, model) == rounded
    # One at a time and eight at once, tokens are the same.
    prompt = {"prompt": TEXT, "max_tokens": 24, "n": 1}
    alone = server.tokens(model="kjv", **prompt)
    status, answer = server.complete(model="kjv", prompt=[TEXT] * 8, max_tokens=24, temperature=0,
                                     ignore_eos=True, return_token_ids=True)
    assert status == 200
    assert all(choice["token_ids"] == alone for choice in answer["choices"])
    assert server.stop() == 0
