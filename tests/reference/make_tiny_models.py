#!/usr/bin/env python3
"""Makes tests/fixtures/models/: tiny random models of the Llama architecture, PEFT adapters for
them, and what HF transformers + PEFT answer, in f32 on the CPU.

Each model is one folder: config.json and weights as transformers saves them, adapters/NAME as PEFT
saves them, and expected.safetensors, whose tensors are named VARIANT/PROMPT/WHAT:
    VARIANT  "base", the name of an adapter, or "mix" (adapters in order of name, weights in
             mix/weights)
    WHAT     ids     I32 [n]      the prompt
             rows    I32 [m]      the positions whose logits are kept
             logits  F32 [m, V]
             greedy  I32 [16]     the greedy continuation, computed without a KV cache

Weights are large enough that logits are of order 1 and that each adapter and each position matter;
a prompt is taken only when every greedy token wins by a clear margin, so that the order of
summation cannot change it. Run: python make_tiny_models.py [OUT]   (see requirements.txt)
"""
import json
import math
import pathlib
import shutil
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM)

GREEDY = 16
MARGIN = 5e-3
LENGTHS = {1: [0], 7: range(7), 16: [0, 14, 15], 17: [15, 16], 50: [15, 16, 31, 33, 48, 49]}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
EVERY = dict(r=8, lora_alpha=12, target_modules=ALL)
RSLORA = dict(r=6, lora_alpha=5, target_modules=ALL, use_rslora=True)
PATTERNS = dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
                rank_pattern={"layers.1.self_attn.q_proj": 7, "down_proj": 1},
                alpha_pattern={"o_proj": 3}, layers_to_transform=None)
ONE_LAYER = dict(r=3, lora_alpha=6, target_modules=["o_proj", "up_proj"], layers_to_transform=[1])

SMALL = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
             bos_token_id=1, eos_token_id=2, pad_token_id=None, rms_norm_eps=1e-5,
             tie_word_embeddings=False)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def llama(**changes):
    return LlamaForCausalLM, LlamaConfig(**{**SMALL, **changes})


MODELS = {
    "mha": dict(make=llama(), adapters={"every": EVERY, "qv": QV}, mix=[0.25, 0.75]),
    "gqa_tied": dict(make=llama(num_key_value_heads=2, num_hidden_layers=3,
                                tie_word_embeddings=True),
                     adapters={"patterns": PATTERNS, "rslora": RSLORA}),
    # Saved in the spelling of transformers 4: rope_theta, rope_scaling, torch_dtype.
    "llama3_rope": dict(make=llama(rope_parameters=LLAMA3, num_key_value_heads=2), old_names=True,
                        adapters={"every": EVERY}),
    "linear_rope": dict(make=llama(rope_parameters=LINEAR, num_key_value_heads=1),
                        adapters={"qv": QV}),
    "wide_head": dict(make=llama(hidden_size=36, num_attention_heads=3, num_key_value_heads=1,
                                 head_dim=24, intermediate_size=56),
                      adapters={"every": EVERY, "one_layer": ONE_LAYER}),
    "mistral": dict(make=(MistralForCausalLM,
                          MistralConfig(**{**SMALL, "num_key_value_heads": 2, "head_dim": 16,
                                           "sliding_window": None})),
                    adapters={"rslora": RSLORA}),
    "bf16_stored": dict(make=llama(num_key_value_heads=2), store=torch.bfloat16,
                        adapters={"qv": QV}),
    "f16_stored": dict(make=llama(num_key_value_heads=2), store=torch.float16,
                       adapters={"every": EVERY}),
    "sharded": dict(make=llama(num_key_value_heads=2), shard="60KB", adapters={"qv": QV}),
}


def randomize(model, seed):
    """Every matrix [out, in] gets deviation 1.2 / sqrt(in); norms gains in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if value.dim() == 1:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            else:
                scale = 1.2 / math.sqrt(value.shape[1])
                value.copy_(torch.randn(value.shape, generator=generator) * scale)


def randomize_adapter(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if "lora_" in name:
                scale = 0.7 / math.sqrt(value.shape[1])
                value.copy_(torch.randn(value.shape, generator=generator) * scale)


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def answer(model, ids):
    """Logits of the prompt, its greedy continuation, and the smallest lead of a greedy token."""
    prompt_logits = logits_of(model, ids)
    tokens, lead, logits = list(ids), math.inf, prompt_logits
    for _ in range(GREEDY):
        best = torch.topk(logits[-1], 2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        logits = logits_of(model, tokens)
    return prompt_logits, tokens[len(ids):], lead


def expect(model, variant, vocabulary, seed, out):
    for length, rows in LENGTHS.items():
        for attempt in range(1000):
            generator = torch.Generator().manual_seed(seed + 1000 * length + attempt)
            ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
            logits, greedy, lead = answer(model, ids)
            if lead > MARGIN:
                break
        else:
            sys.exit(f"{variant}: no prompt of {length} tokens has a clear greedy continuation")
        name = f"{variant}/{length}"
        out[f"{name}/ids"] = torch.tensor(ids, dtype=torch.int32)
        out[f"{name}/rows"] = torch.tensor(list(rows), dtype=torch.int32)
        out[f"{name}/logits"] = logits[list(rows)].contiguous()
        out[f"{name}/greedy"] = torch.tensor(greedy, dtype=torch.int32)


def use_old_names(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def set_weights(model, names, weights):
    """Both adapters at once, each scaled by its weight."""
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights):
                if name in module.scaling:
                    module.scaling[name] *= weight


def check_it_matters(base, out, variants):
    """A fixture whose adapters did nothing would let a server that ignores them pass."""
    ids = out["base/50/ids"].tolist()
    reference = logits_of(base, ids)
    spread = float(reference.std())
    assert spread > 0.5, f"logits of deviation {spread}"
    for name, model in variants:
        change = float((logits_of(model, ids) - reference).abs().mean())
        assert change > 0.1, f"{name} changes logits by {change} only"


def make(folder, spec, seed):
    kind, config = spec["make"]
    config._attn_implementation = "eager"
    model = kind(config).eval()
    randomize(model, seed)
    model = model.to(spec.get("store", torch.float32))
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(folder, max_shard_size=spec.get("shard", "1GB"))
    if spec.get("old_names"):
        use_old_names(folder)

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                    attn_implementation="eager").eval()

    out, variants, base = {}, [], load()
    expect(base, "base", config.vocab_size, seed, out)
    for index, (name, settings) in enumerate(sorted(spec["adapters"].items())):
        trained = get_peft_model(load(), LoraConfig(**settings), adapter_name="default")
        randomize_adapter(trained, seed + 77 + index)
        path = folder / "adapters" / name
        trained.save_pretrained(path)
        (path / "README.md").unlink(missing_ok=True)
        hide_path(path / "adapter_config.json")
        adapted = PeftModel.from_pretrained(load(), path).eval()
        expect(adapted, name, config.vocab_size, seed + 13 * index + 1, out)
        variants.append((name, adapted))
    if "mix" in spec:
        names = sorted(spec["adapters"])
        mixed = PeftModel.from_pretrained(load(), folder / "adapters" / names[0],
                                          adapter_name=names[0])
        for name in names[1:]:
            mixed.load_adapter(folder / "adapters" / name, adapter_name=name)
        set_weights(mixed.eval(), names, spec["mix"])
        expect(mixed, "mix", config.vocab_size, seed + 99, out)
        out["mix/weights"] = torch.tensor(spec["mix"], dtype=torch.float32)
        variants.append(("mix", mixed))
    check_it_matters(base, out, variants)
    save_file(out, folder / "expected.safetensors", metadata={"format": "pt"})


def hide_path(path):
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main():
    here = pathlib.Path(__file__).resolve().parent
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "fixtures" / "models"
    torch.set_num_threads(1)
    for index, (name, spec) in enumerate(MODELS.items()):
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder, spec, 20000 + 500 * index)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        print(f"{name}: {size} bytes", flush=True)


if __name__ == "__main__":
    main()
