#!/usr/bin/env python3
"""Records what transformers and PEFT make of demo/model and demo/adapters, computed in float32 from
the bfloat16 files, for tests/unit/test_demo_golden.c.

    VENV/bin/python tests/reference/make_demo_goldens.py    (VENV as in demo/train.py)

Writes, under tests/fixtures/demo/:
  cases.jsonl         one object a line: adapters ([name, weight] pairs; none: the base model),
                      prompt (ids), positions (of the prompt, whose logits are stored), tokens (greedy
                      continuation, end of text ignored), gaps (at each of them, the best logit less
                      the second best)
  logits.safetensors  for line N of cases.jsonl, tensor "N": [positions, vocabulary] float32
  tokenizer.jsonl     for each line of ../tokenizers/strings.jsonl: ids, special tokens parsed, and
                      text, what they decode to without special tokens (absent: as the string)
"""

import json
import pathlib

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODEL, ADAPTERS = ROOT / "demo" / "model", ROOT / "demo" / "adapters"
FIXTURES = ROOT / "tests" / "fixtures"
STEPS = 32

# A prompt's text and how many tokens of it are used, BOS counted; page and chunk edges among them.
PREAMBLE = """We the People of the United States, in Order to form a more perfect Union, establish
Justice, insure domestic Tranquility, provide for the common defence, promote the general Welfare,
and secure the Blessings of Liberty to ourselves and our Posterity, do ordain and establish this
Constitution for the United States of America. All legislative Powers herein granted shall be vested
in a Congress of the United States, which shall consist of a Senate and House of Representatives."""
NOVEL = """It is a truth universally acknowledged, that a single man in possession of a good
fortune, must be in want of a wife. However little known the feelings or views of such a man may be
on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding
families, that he is considered as the rightful property of some one or other of their daughters.
"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at
last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been
here, and she told me all about it." Mr. Bennet made no answer. "Do not you want to know who has
taken it?" cried his wife impatiently. "You want to tell me, and I have no objection to hearing it."
This was invitation enough. "Why, my dear, you must know, Mrs. Long says that Netherfield is taken by
a young man of large fortune from the north of England." """
GENESIS = """1:1 In the beginning God created the heaven and the earth.
1:2 And the earth was without form, and void; and darkness was upon the face of the deep. And the
Spirit of God moved upon the face of the waters."""
PROMPTS = [("", 1), ("The", 2), (NOVEL, 16), (PREAMBLE, 17), (GENESIS, 33), (PREAMBLE, 97),
           (NOVEL, 200)]
MORE_POSITIONS = {5: [0, 15, 16, 63]}  # of that prompt, beside the last
OWN = {"kjv": "3:1 And it came to pass in those days, that", "law": "Section 2\n\nThe President shall",
       "spell": "garden: g-a-r-d-e-n\nwinter: ", "caps": "THE YOUNG LADY WAS",
       "gopher": "// Len returns the number of", "devil": "MARRIAGE, n. ",
       "jargon": "hacker n.\n\n[originally, someone who", "webster": "Harmony \\Har\"mo*ny\\, n.;"}
MIXES = [[["kjv", 0.5], ["gopher", 0.75]], [["devil", 1.0], ["jargon", 0.5], ["caps", -0.25]]]


class Reference:
    """The base model with any of the adapters on it, at any weights."""

    def __init__(self, names):
        base = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, ADAPTERS / names[0], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(ADAPTERS / name, adapter_name=name)
        self.model.float().eval()
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self.scalings = [dict(layer.scaling) for layer in self.layers]

    def use(self, adapters):
        self.adapters = adapters
        for layer, scalings in zip(self.layers, self.scalings):
            for name, weight in adapters:
                if name in scalings:
                    layer.scaling[name] = scalings[name] * weight
        if adapters:
            self.model.base_model.set_adapter([name for name, _ in adapters])

    @torch.no_grad()
    def logits(self, ids):
        batch = torch.tensor([ids])
        if self.adapters:
            return self.model(input_ids=batch).logits[0]
        with self.model.disable_adapter():
            return self.model(input_ids=batch).logits[0]


def cases(tokenizer, names):
    """(adapters, ids, positions) of every case."""
    def ids_of(text, count):
        ids = tokenizer.encode(text).ids
        assert len(ids) >= count, (text, len(ids))
        return ids[:count]

    for adapters in [[]] + [[[name, 1.0]] for name in names] + MIXES:
        for i, (text, count) in enumerate(PROMPTS):
            if len(adapters) < 2 or i in (3, 4):
                yield adapters, ids_of(text, count), MORE_POSITIONS.get(i, []) + [count - 1]
        if len(adapters) == 1:
            ids = tokenizer.encode(OWN[adapters[0][0]]).ids
            yield adapters, ids, [len(ids) - 1]


def record(reference, adapters, prompt, positions):
    reference.use(adapters)
    logits = reference.logits(prompt)
    stored = logits[positions].clone()
    tokens, gaps, ids = [], [], list(prompt)
    for step in range(STEPS):
        last = (logits if step == 0 else reference.logits(ids))[-1]
        best = last.topk(2).values
        tokens.append(int(last.argmax()))
        gaps.append(round(float(best[0] - best[1]), 7))
        ids.append(tokens[-1])
    return stored, {"adapters": adapters, "prompt": prompt, "positions": positions,
                    "tokens": tokens, "gaps": gaps}


def write_tokenizer(tokenizer, path):
    lines = []
    for line in (FIXTURES / "tokenizers" / "strings.jsonl").read_text().split("\n")[:-1]:
        text = json.loads(line)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        lines.append({"ids": ids} | ({} if decoded == text else {"text": decoded}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(len(lines), "strings")


def main():
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    out = FIXTURES / "demo"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    write_tokenizer(tokenizer, out / "tokenizer.jsonl")
    names = sorted(path.name for path in ADAPTERS.iterdir())
    assert set(names) == set(OWN), names
    reference = Reference(names)
    tensors, lines = {}, []
    for adapters, prompt, positions in cases(tokenizer, names):
        tensors[str(len(lines))], line = record(reference, adapters, prompt, positions)
        lines.append(json.dumps(line) + "\n")
        text = tokenizer.decode(line["tokens"])
        print(adapters, len(prompt), min(line["gaps"]), repr(text), flush=True)
    save_file(tensors, out / "logits.safetensors")
    (out / "cases.jsonl").write_text("".join(lines))
    near = sum(gap <= 1e-4 for line in lines for gap in json.loads(line)["gaps"])
    print(len(lines), "cases;", near, "places where the two best logits lie within 1e-4")


if __name__ == "__main__":
    main()
