#!/usr/bin/env python3
"""What rounding the base model's weights costs in perplexity, through the server's own API.

    python3 bench/perplexity.py [--model demo/model] [--text FILE] [--out bench/results/cpu-perplexity.json]

Windows of text are sent as prompts with echo and logprobs; perplexity is exp of the mean negative
log-probability of their tokens but each window's first. Without --text the text is what the demo model
was not trained on: every twelfth chapter of Jane Austen, out of a Debian package (demo/texts.py).
"""
import argparse
import json
import math
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]
from cold_adapters import Server  # noqa: E402
from record import save  # noqa: E402

WINDOWS, CHARACTERS = 80, 900
KINDS = [("f32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "int4")]


def held_out():
    import texts
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        texts.unpack(root)
        documents = texts.read_all(root)["austen"][1]
    return "\n\n".join(joint.join(units) for units, joint in documents)


def perplexity(server, model, windows):
    total, count = 0.0, 0
    for window in windows:
        status, text = server.request("POST", "/v1/completions", {
            "model": model, "prompt": window, "max_tokens": 0, "echo": True, "logprobs": 0})
        assert status == 200, text
        values = json.loads(text)["choices"][0]["logprobs"]["token_logprobs"][1:]
        total -= sum(values)
        count += len(values)
    return math.exp(total / count), count


def main():
    options = argparse.ArgumentParser(description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lorad", default="build/lorad")
    options.add_argument("--model", default=str(HERE.parent / "demo" / "model"))
    options.add_argument("--text")
    options.add_argument("--out", default=str(HERE / "results" / "cpu-perplexity.json"))
    options = options.parse_args()
    text = pathlib.Path(options.text).read_text(encoding="utf-8") if options.text else held_out()
    windows = [text[i:i + CHARACTERS] for i in range(0, len(text), CHARACTERS)][:WINDOWS]
    rows = []
    for dtype, quantization in KINDS:
        server = Server(options.lorad, [], "--dtype", dtype, "--quantization", quantization,
                        "--served-model-name", "model", model=options.model, dummy=False)
        value, tokens = perplexity(server, "model", windows)
        server.stop()
        rows.append({"dtype": dtype, "quantization": quantization, "perplexity": value,
                     "against_first": value / rows[0]["perplexity"] - 1 if rows else 0.0})
        print(f"{dtype:5} {quantization:5} {value:.4f} {rows[-1]['against_first']:+.3%}", flush=True)
    save(options.out, f"perplexity by weight format, {pathlib.Path(options.model).name}",
         "python3 bench/perplexity.py", {"tokens": tokens, "rows": rows})


if __name__ == "__main__":
    main()
