#!/usr/bin/env python3
"""torch + PEFT on the shapes of the benchmark: LoRA r 16 on all linear layers, f32, batch 4 x 128 tokens.

    peft_lora.py MODEL_DIR ROWS.jsonl [STEPS]

ROWS.jsonl has `text` rows of at least 128 tokens each; every token is trained on, as pipit-distill does with
`text`. Prints a JSON object: tokens/s (the first step is not counted) and the peak resident memory.
"""
import json
import resource
import sys
import time

import peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model_dir, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
torch.set_num_threads(2)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
rows = [tokenizer(json.loads(line)["text"]).input_ids[:128] for line in open(data, encoding="utf-8")]
rows = [row for row in rows if len(row) == 128]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
tokens, seconds = 0, 0.0
for step in range(steps + 1):
    start = time.perf_counter()
    ids = torch.tensor([rows[(step * 4 + i) % len(rows)] for i in range(4)])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step > 0:
        tokens += ids.numel()
        seconds += time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"torch": torch.__version__.split("+")[0], "peft": peft.__version__, "loss": loss.item(),
                  "tokens_per_second": tokens / seconds, "peak_mib": peak}))
