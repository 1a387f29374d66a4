#!/usr/bin/env python3
"""The model and the adapters that every engine of the comparison loads: one set of random weights.

    make_model.py FOLDER [--config bench/models/tinyllama-1.1b/config.json] [--adapters 16]

Writes FOLDER/hf (config.json, model.safetensors in bf16, a tokenizer.json whose only use is to be
there: prompts are token ids), FOLDER/adapters/aNN (PEFT folders, rank 16, all seven projections),
and, where the package `gguf` is, FOLDER/model.gguf and FOLDER/aNN.gguf. Needs numpy. Adapters are small enough that greedy tokens stay
tokens; nothing here is compared for what it says, only for how fast.
"""
import argparse
import json
import pathlib
import struct

import numpy

HERE = pathlib.Path(__file__).resolve().parent
MODULES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
           "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
           "mlp.down_proj": "ffn_down"}
RANK = 16


def bf16(values):
    """float32 -> the upper halves, rounded to nearest even."""
    bits = values.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(numpy.uint16)


def shapes(config):
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    return {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn)}


def write_safetensors(path, tensors):
    """tensors: (name, shape, function that makes uint16 bf16 bits), made one at a time."""
    header, offset = {}, 0
    for name, shape, _ in tensors:
        end = offset + 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, make in tensors:
            file.write(make().tobytes())


def model_tensors(config, seed=1):
    """(HF name, GGUF name, shape, function) of each tensor, in order."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    state = {"n": seed * 1000}

    def weights(shape):
        state["n"] += 1
        number = state["n"]
        return lambda: bf16(numpy.random.default_rng(number).standard_normal(shape, numpy.float32)
                            * 0.02)

    def ones(shape):
        return lambda: bf16(numpy.ones(shape, numpy.float32))
    yield "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden), \
        weights((vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes(config).items():
            yield f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{MODULES[name]}.weight", \
                shape, weights(shape)
        for name, short in (("input_layernorm", "attn_norm"),
                            ("post_attention_layernorm", "ffn_norm")):
            yield f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{short}.weight", (hidden,), \
                ones((hidden,))
    yield "model.norm.weight", "output_norm.weight", (hidden,), ones((hidden,))
    yield "lm_head.weight", "output.weight", (vocabulary, hidden), weights((vocabulary, hidden))


def adapter_tensors(config, seed):
    generator = numpy.random.default_rng(seed)
    for layer in range(config["num_hidden_layers"]):
        for name, (out, into) in shapes(config).items():
            for matrix, shape in (("A", (RANK, into)), ("B", (out, RANK))):
                values = generator.standard_normal(shape, numpy.float32) * 0.01
                yield layer, name, matrix, shape, values


def write_tokenizer(path, vocabulary):
    tokens = {f"<0x{i:02X}>" if i < 256 else f"t{i}": i for i in range(vocabulary)}
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": True, "vocab": tokens, "merges": []}}))


def write_gguf(folder, config, adapters):
    import gguf
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    count = config["vocab_size"]
    kinds = [gguf.TokenType.BYTE if i < 256 else gguf.TokenType.NORMAL for i in range(count)]
    writer.add_token_list([f"<0x{i:02X}>" if i < 256 else f"t{i}" for i in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for _, name, shape, make in model_tensors(config):
        values = make()
        if len(shape) == 1:  # norms are f32 in GGUF
            writer.add_tensor(name, (values.astype(numpy.uint32) << 16).view(numpy.float32))
        else:
            writer.add_tensor(name, values.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    finish(writer)
    for number in range(adapters):
        writer = gguf.GGUFWriter(str(folder / f"a{number:02d}.gguf"), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(RANK))
        for layer, name, matrix, _, values in adapter_tensors(config, number):
            writer.add_tensor(f"blk.{layer}.{MODULES[name]}.weight.lora_{matrix.lower()}", values)
        finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=pathlib.Path)
    options.add_argument("--config", default=str(HERE.parent / "models/tinyllama-1.1b/config.json"))
    options.add_argument("--adapters", type=int, default=16)
    options = options.parse_args()
    config = json.loads(pathlib.Path(options.config).read_text())
    hf = options.folder / "hf"
    hf.mkdir(parents=True, exist_ok=True)
    (hf / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(hf / "tokenizer.json", config["vocab_size"])
    (hf / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    write_safetensors(hf / "model.safetensors",
                      [(name, shape, make) for name, _, shape, make in model_tensors(config)])
    for number in range(options.adapters):
        folder = options.folder / "adapters" / f"a{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "adapter_model.safetensors", [
            (f"base_model.model.model.layers.{layer}.{name}.lora_{matrix}.weight", shape,
             lambda values=values: bf16(values))
            for layer, name, matrix, shape, values in adapter_tensors(config, number)])
        (folder / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none",
             "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": str(hf),
             "target_modules": [name.split(".")[1] for name in MODULES]}))
    try:
        write_gguf(options.folder, config, options.adapters)
    except ImportError:
        print("no package gguf: nothing for llama.cpp")


if __name__ == "__main__":
    main()
