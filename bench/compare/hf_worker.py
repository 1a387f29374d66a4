"""transformers + PEFT as a worker: hf_worker.py FOLDER ADAPTERS, asked by engines.py line by line."""
import json
import sys
import time

import torch
import transformers
from peft import PeftModel

folder, count = sys.argv[1], int(sys.argv[2])
base = transformers.AutoModelForCausalLM.from_pretrained(folder + "/hf", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, folder + "/adapters/a00", adapter_name="a00")
for i in range(1, count):
    model.load_adapter(f"{folder}/adapters/a{i:02d}", adapter_name=f"a{i:02d}")
model.to(torch.bfloat16)
model.eval()

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    names = ["__base__" if a is None else f"a{a:02d}" for a in job["adapters"]]
    ids = torch.tensor(job["prompts"])
    moments = []
    begin = time.monotonic()

    def hook(module, arguments, output):
        moments.append(time.monotonic())
    handle = base.lm_head.register_forward_hook(hook)
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                       min_new_tokens=job["output"], max_new_tokens=job["output"],
                       pad_token_id=0, adapter_names=names)
    handle.remove()
    print(json.dumps([{"first_s": moments[0] - begin, "last_s": time.monotonic() - begin,
                       "tokens": job["output"]}] * len(names)), flush=True)
