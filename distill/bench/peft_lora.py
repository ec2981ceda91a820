#!/usr/bin/env python3
"""torch + PEFT on the shapes of the benchmark: LoRA r 16 on all linear layers.

    peft_lora.py MODEL_DIR ROWS.jsonl [STEPS] [--batch 4] [--length 128] [--device cpu] [--bf16]

ROWS.jsonl has `text` rows of at least `length` tokens each; every token is trained on, as pipit-distill does with
`text`. With --bf16 the frozen weights are in bfloat16, the adapter's in f32 (PEFT's autocast_adapter_dtype), under
autocast. Prints a JSON object with tokens/s; the first step is not counted.
"""
import argparse
import json
import time

import peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("rows")
parser.add_argument("steps", type=int, nargs="?", default=10)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--device", default="cpu")
parser.add_argument("--bf16", action="store_true")
options = parser.parse_args()
if options.device == "cpu":
    torch.set_num_threads(2)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
rows = [tokenizer(json.loads(line)["text"]).input_ids[:options.length] for line in open(options.rows, encoding="utf-8")]
rows = [row for row in rows if len(row) == options.length]
model = AutoModelForCausalLM.from_pretrained(
    options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32).to(options.device)
config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
tokens, seconds = 0, 0.0
for step in range(options.steps + 1):
    start = time.perf_counter()
    ids = torch.tensor([rows[(step * options.batch + i) % len(rows)] for i in range(options.batch)], device=options.device)
    with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()  # waits for the device
    if step > 0:
        tokens += ids.numel()
        seconds += time.perf_counter() - start
print(json.dumps({"torch": torch.__version__.split("+")[0], "peft": peft.__version__, "loss": value,
                  "tokens_per_second": tokens / seconds}))
