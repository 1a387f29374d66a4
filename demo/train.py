#!/usr/bin/env python3
"""Makes the demo model and its LoRA adapters, on two CPU cores in under an hour.

    python3 -m venv VENV && VENV/bin/pip install torch transformers peft tokenizers safetensors
    VENV/bin/python demo/train.py                 every stage
    VENV/bin/python demo/train.py base kjv table  some of: texts tokenizer base ADAPTER... table

Stages leave their results in demo/model, demo/adapters and the work folder (--work), and a later
stage starts from what the earlier ones left. Seeds are fixed. What is saved is bfloat16; the table
is measured on what was saved, computed in float32.
"""

import argparse
import json
import math
import pathlib
import shutil
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import texts

HERE = pathlib.Path(__file__).resolve().parent
MODEL, ADAPTERS = HERE / "model", HERE / "adapters"
VOCABULARY, WINDOW, BATCH = 4096, 256, 8
BASE_STEPS, BASE_RATE = 2600, 2e-3
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n\n' }}"
                 "{% endfor %}")

# What the base model reads, as shares of its windows: mostly novels, a little of each other text.
BASE_SHARES = {"austen": 0.54, "opticks": 0.08, "webster": 0.12, "kjv": 0.08, "jargon": 0.07,
               "gopher": 0.06, "devil": 0.03, "law": 0.02}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# name: rank, alpha, modules, steps, learning rate, rsLoRA
SPECS = {
    "kjv": (8, 16, ATTENTION, 260, 4e-3, False),
    "law": (4, 8, ATTENTION + MLP, 60, 4e-3, False),
    "spell": (8, 16, MLP, 200, 5e-3, False),
    "caps": (16, 32, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], 260, 4e-3, False),
    "gopher": (16, 32, ATTENTION + MLP, 260, 3e-3, False),
    "devil": (16, 16, ATTENTION + MLP, 140, 3e-3, False),
    "jargon": (32, 16, ATTENTION + MLP, 220, 2e-3, True),
    "webster": (64, 64, ATTENTION + MLP, 240, 1.5e-3, False),
}


# ------------------------------------------------------------------ tokens

def train_tokenizer(split):
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

    def corpus():
        for name, (train, _) in split.items():
            budget = 1_500_000 if name in BASE_SHARES else 200_000
            for units, joint in train:
                budget -= sum(map(len, units))
                if budget > 0:
                    yield joint.join(units)

    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    MODEL.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(MODEL / "tokenizer.json"))
    (MODEL / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
         "model_max_length": 1024, "clean_up_tokenization_spaces": False,
         "chat_template": CHAT_TEMPLATE}, indent=2) + "\n")


def load_tokenizer():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


class Stream:
    """The tokens of documents end to end, and where windows may begin: at units."""

    def __init__(self, tokenizer, documents):
        self.bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        ids, self.starts = [], []
        for units, joint in documents:
            pieces = [unit + joint for unit in units[:-1]] + units[-1:]
            for piece in tokenizer.encode_batch(pieces, add_special_tokens=False):
                self.starts.append(len(ids))
                ids += piece.ids
            ids.append(eos)
        self.ids = torch.tensor(ids)
        while len(self.starts) > 1 and self.starts[-1] + WINDOW - 1 > len(ids):
            self.starts.pop()

    def window(self, start):
        return torch.cat([torch.tensor([self.bos]), self.ids[start:start + WINDOW - 1]])

    def sample(self, generator):
        at = torch.randint(len(self.starts), (1,), generator=generator).item()
        return self.window(self.starts[at])

    def fixed(self, count):
        """Windows one after the other: what perplexity is measured on."""
        firsts = range(0, len(self.ids) - WINDOW + 2, WINDOW - 1)
        return torch.stack([self.window(first) for first in list(firsts)[:count]])


# ------------------------------------------------------------------ training

def optimise(model, rate, steps, batch_of, decay, label):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    warm = max(10, steps // 20)
    began, shown = time.time(), 0.0
    model.train()
    for step in range(steps):
        along = max(0.0, (step - warm) / (steps - warm))
        scale = min((step + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * along)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        batch = batch_of()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown += loss.item()
        if (step + 1) % 20 == 0:
            print(f"{label} step {step + 1}/{steps} loss {shown / 20:.3f} "
                  f"{time.time() - began:.0f}s", flush=True)
            shown = 0.0


def train_base(tokenizer, split):
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=tokenizer.token_to_id(EOS))
    model = LlamaForCausalLM(config)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
    streams = [Stream(tokenizer, split[name][0]) for name in BASE_SHARES]
    shares = torch.tensor(list(BASE_SHARES.values()))

    def batch_of():
        chosen = torch.multinomial(shares, BATCH, replacement=True, generator=generator)
        return torch.stack([streams[i].sample(generator) for i in chosen])

    optimise(model, BASE_RATE, BASE_STEPS, batch_of, 0.1, "base")
    model.to(torch.bfloat16).save_pretrained(MODEL)


def load_base():
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def train_adapter(name, tokenizer, split):
    rank, alpha, modules, steps, rate, rank_stabilised = SPECS[name]
    torch.manual_seed(100 + list(SPECS).index(name))
    generator = torch.Generator().manual_seed(200 + list(SPECS).index(name))
    model = get_peft_model(load_base(), LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0, bias="none",
        use_rslora=rank_stabilised, task_type="CAUSAL_LM"))
    stream = Stream(tokenizer, split[name][0])
    optimise(model, rate, steps,
             lambda: torch.stack([stream.sample(generator) for _ in range(BATCH)]), 0.0, name)
    folder = ADAPTERS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config.update(base_model_name_or_path="demo/model", target_modules=modules)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ------------------------------------------------------------------ the table

@torch.no_grad()
def perplexity(model, windows):
    model.eval()
    loss = sum(model(input_ids=part, labels=part).loss.item() * len(part)
               for part in windows.split(8))
    return math.exp(loss / len(windows))


def measure(tokenizer, split):
    """Rows: base and adapters; columns: each adapter's held-out text, and the base's."""
    names = [name for name in SPECS if (ADAPTERS / name).exists()]
    held = {name: Stream(tokenizer, split[name][1]).fixed(24) for name in names + ["austen"]}
    rows = {"base": [perplexity(load_base(), windows) for windows in held.values()]}
    for name in names:
        # load_base each time: PEFT changes the model that it is given
        model = PeftModel.from_pretrained(load_base(), ADAPTERS / name).float()
        rows[name] = [perplexity(model, windows) for windows in held.values()]
    return list(held), rows


def write_table(tokenizer, split):
    columns, rows = measure(tokenizer, split)
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(
        f"**{value:.1f}**" if columns[i] == name else f"{value:.1f}"
        for i, value in enumerate(values)) + " |" for name, values in rows.items()]
    table = "\n".join(lines)
    print(table)
    readme = HERE / "README.md"
    if readme.exists():
        head, rest = readme.read_text().split("<!-- table -->", 1)
        tail = rest.split("<!-- end of table -->", 1)[1]
        readme.write_text(f"{head}<!-- table -->\n{table}\n<!-- end of table -->{tail}")
    for i, column in enumerate(columns):
        if column in SPECS:
            best = min(rows, key=lambda name: rows[name][i])
            assert best == column, f"{best} is better than {column} on {column}'s text"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--work", type=pathlib.Path, default=HERE.parent / "build" / "demo-texts")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    stages = options.stages or ["texts", "tokenizer", "base", *SPECS, "table"]
    unknown = set(stages) - {"texts", "tokenizer", "base", "table", *SPECS}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    if "texts" in stages:
        texts.unpack(options.work)
    split = texts.read_all(options.work)
    if "tokenizer" in stages:
        train_tokenizer(split)
    tokenizer = load_tokenizer()
    if "base" in stages:
        train_base(tokenizer, split)
    for name in SPECS:
        if name in stages:
            train_adapter(name, tokenizer, split)
    if "table" in stages:
        write_table(tokenizer, split)


if __name__ == "__main__":
    main()
