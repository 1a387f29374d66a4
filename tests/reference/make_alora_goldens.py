#!/usr/bin/env python3
"""Records what PEFT makes of activated LoRA (aLoRA): demo adapters with invocation tokens in their
configuration, on demo/model, computed in float32, for tests/e2e/test_alora.py.

    VENV/bin/python tests/reference/make_alora_goldens.py    (VENV as in requirements.txt)

Writes tests/fixtures/demo/alora.json: invocation (token ids) and cases: adapter, prompt (ids),
logprobs (of the prompt's tokens but the first), tokens (greedy continuation, end of text ignored).
"""
import json
import pathlib
import shutil
import tempfile

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODEL, ADAPTERS = ROOT / "demo" / "model", ROOT / "demo" / "adapters"
STEPS = 24
TEXT = ("It is a truth universally acknowledged, that a single man in possession of a good fortune, "
        "must be in want of a wife. However little known the feelings or views of such a man may be ")
CALL = "3:1 And it came to pass"


def adapter_with(folder, name, invocation):
    to = folder / name
    shutil.copytree(ADAPTERS / name, to)
    config = json.loads((to / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = invocation
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def case(model, name, prompt):
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
        logprobs = torch.log_softmax(logits, -1)
        tokens = model.generate(input_ids=torch.tensor([prompt]),
                                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
                                eos_token_id=None, pad_token_id=0)[0][len(prompt):]
    return {"adapter": name, "prompt": prompt, "tokens": tokens.tolist(),
            "logprobs": [round(logprobs[i, t].item(), 6) for i, t in enumerate(prompt[1:])]}


def main():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids
    call, text = ids(CALL), ids(TEXT)
    prompts = [text + call, text[:16] + call + text[:9], call + text, call + text + call + ids(" in"),
               text, call, text[:31] + call[:-1]]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kjv", "law"):
            base = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            adapter = adapter_with(pathlib.Path(folder), name, call)
            model = PeftModel.from_pretrained(base, adapter).float().eval()
            cases += [case(model, name, prompt) for prompt in prompts]
    out = ROOT / "tests" / "fixtures" / "demo" / "alora.json"
    out.write_text(json.dumps({"invocation": call, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
