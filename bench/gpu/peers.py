#!/usr/bin/env python3
"""What torch makes of the same work on the same device: limits, LoRA over distinct adapters, PEFT.

    bench/gpu/peers.py [--device cuda] [--model bench/models/llama-2-7b] [--json FILE]

1. Limits: bytes a second of a large copy and of page-locked host memory, both ways, operations a
   second of a bf16 matmul of 8192.
2. A layer's base matmuls (qkv, o, gate+up, down) at 1 to 64 rows, as bytes a second of weights.
3. Attention of 1 to 64 decodes at 512 tokens of context (scaled_dot_product_attention), as bytes a
   second of keys and values.
4. LoRA at 1 to 256 rows, each on an adapter of its own, ranks 8, 16, 64: gather and two batched
   matmuls (torch.bmm), as bytes a second of A and B; the naive way that kernels must beat.
5. transformers + PEFT, --batch requests in one static batch, without adapters and each with its own
   of rank 16 on all seven modules: output tokens a second, milliseconds a decode step.

Random weights. Needs torch, and transformers and peft for the last part; what is missing is said and
left out. --tiny: everything small, for machines without a GPU.
"""
import argparse
import json
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def seconds_of(run, device, rounds=10):
    """The median of `rounds` runs of run() after two that warm up."""
    def wait():
        if device == "cuda":
            torch.cuda.synchronize()
    times = []
    for round_ in range(rounds + 2):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        if round_ >= 2:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def many(make, count):
    """Calls of make() on so many different weights that no cache holds them: their mean time counts."""
    items = [make() for _ in range(count)]

    def run_all(function):
        for item in items:
            function(item)
    return run_all, count


def limits(device, tiny):
    size = 256 if tiny else 8192
    elements = 1 << (16 if tiny else 29)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.zeros(elements, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    host = torch.zeros(elements, dtype=torch.uint8, pin_memory=device == "cuda")
    return {
        "copy_bytes_per_s": 2 * elements / seconds_of(lambda: target.copy_(source), device),
        "host_to_device_bytes_per_s":
            elements / seconds_of(lambda: target.copy_(host, non_blocking=True), device),
        "device_to_host_bytes_per_s":
            elements / seconds_of(lambda: host.copy_(target, non_blocking=True), device),
        "bf16_flops_per_s": 2 * size ** 3 / seconds_of(lambda: a @ a, device),
    }


def base_matmuls(config, device, layers):
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    kv = config.get("num_key_value_heads", config["num_attention_heads"]) * head
    shapes = {"qkv": (hidden + 2 * kv, hidden), "o": (hidden, hidden),
              "gate_up": (2 * ffn, hidden), "down": (hidden, ffn)}
    rows = []
    for name, (out, inside) in shapes.items():
        run_all, count = many(lambda: torch.randn(out, inside, device=device,
                                                  dtype=torch.bfloat16), layers)
        for m in 1, 4, 16, 32, 64:
            x = torch.randn(m, inside, device=device, dtype=torch.bfloat16)
            took = seconds_of(lambda: run_all(lambda w: x @ w.T), device) / count
            rows.append({"matmul": name, "rows": m, "seconds": took,
                         "weight_bytes_per_s": 2 * out * inside / took})
    return rows


def attention(config, device, tiny):
    """Decodes: one query a sequence against its own keys and values."""
    heads = config["num_attention_heads"]
    size, context = config["hidden_size"] // heads, 64 if tiny else 512
    rows = []
    for m in (1, 4) if tiny else (1, 16, 32, 64):
        def make():
            return [torch.randn(m, heads, context, size, device=device, dtype=torch.bfloat16)
                    for _ in range(2)]
        run_all, count = many(make, 2 if tiny else max(2, 256 // m))
        q = torch.randn(m, heads, 1, size, device=device, dtype=torch.bfloat16)
        took = seconds_of(lambda: run_all(
            lambda kv: torch.nn.functional.scaled_dot_product_attention(q, *kv)), device) / count
        rows.append({"rows": m, "context": context, "seconds": took,
                     "kv_bytes_per_s": 2 * 2 * m * heads * context * size / took})
    return rows


def lora(config, device, tiny):
    hidden = config["hidden_size"]
    rows = []
    for rank in 8, 16, 64:
        for m in (1, 4) if tiny else (1, 8, 32, 64, 256):
            def make():
                return (torch.randn(m, hidden, rank, device=device, dtype=torch.bfloat16),
                        torch.randn(m, rank, hidden, device=device, dtype=torch.bfloat16))
            run_all, count = many(make, 2 if tiny else max(2, 512 // m))
            x = torch.randn(m, 1, hidden, device=device, dtype=torch.bfloat16)
            y = torch.zeros(m, 1, hidden, device=device, dtype=torch.bfloat16)
            took = seconds_of(lambda: run_all(
                lambda ab: y.add_(torch.bmm(torch.bmm(x, ab[0]), ab[1]))), device, 5) / count
            rows.append({"rank": rank, "rows": m, "seconds": took,
                         "adapter_bytes_per_s": 2 * 2 * m * rank * hidden / took})
    return rows


def peft_model(config, device, count):
    """The base model, and the same with `count` adapters of random weights; nothing is read."""
    import transformers
    from peft import LoraConfig, get_peft_model
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    torch.set_default_dtype(torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=16, lora_alpha=16, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(base, settings, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", settings)
    return model.to(device=device, dtype=torch.bfloat16).eval()


def generate(model, device, names, prompt, output, vocabulary):
    ids = torch.randint(3, vocabulary, (len(names), prompt), device=device)
    moments = []
    handle = model.get_base_model().lm_head.register_forward_hook(
        lambda *_: moments.append(time.perf_counter()))
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                       min_new_tokens=output, max_new_tokens=output, pad_token_id=0,
                       adapter_names=names)
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    handle.remove()
    steps = [b - a for a, b in zip(moments, moments[1:])]
    return {"output_tokens_per_s": len(names) * output / took,
            "decode_step_s": statistics.median(steps)}


def peft(config, device, batch, tiny):
    prompt, output = (8, 4) if tiny else (128, 64)
    model = peft_model(config, device, batch)
    names = {"base": ["__base__"] * batch, "distinct adapters": [f"a{i}" for i in range(batch)]}
    result = {"batch": batch, "prompt": prompt, "output": output, "rank": 16}
    for what, chosen in names.items():
        generate(model, device, chosen, prompt, 2, config["vocab_size"]) # warms up
        result[what] = generate(model, device, chosen, prompt, output, config["vocab_size"])
    return result


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--model", default=str(ROOT / "bench/models/llama-2-7b"))
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--commit", default="")
    options.add_argument("--json")
    options.add_argument("--tiny", action="store_true")
    chosen = options.parse_args()
    config = json.loads((pathlib.Path(chosen.model) / "config.json").read_text())
    if chosen.tiny:
        config |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}
        chosen.batch = 2
    device = chosen.device
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result = {"what": "torch and transformers + PEFT on the same device", "device": name,
              "torch": torch.__version__, "commit": chosen.commit,
              "command": " ".join(["bench/gpu/peers.py", *sys.argv[1:]]), "model": chosen.model}
    parts = {"limits": lambda: limits(device, chosen.tiny),
             "base_matmuls": lambda: base_matmuls(config, device, 2 if chosen.tiny else 4),
             "attention": lambda: attention(config, device, chosen.tiny),
             "lora_bmm": lambda: lora(config, device, chosen.tiny),
             "peft": lambda: peft(config, device, chosen.batch, chosen.tiny)}
    failed = 0
    for part, run in parts.items():
        try:
            result[part] = run()
        except Exception as error: # the other parts still run
            failed += not isinstance(error, ImportError)
            result[part] = {"left_out": f"{type(error).__name__}: {error}"[:300]}
        print(part, json.dumps(result[part])[:600], flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    if chosen.json:
        pathlib.Path(chosen.json).write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
