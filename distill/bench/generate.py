#!/usr/bin/env python3
"""transformers' generate on the prompts of the benchmark: eight at a time, drawn at temperature 1, f32.

    generate.py MODEL_DIR ROWS.jsonl MAX_NEW_TOKENS [BATCHES]

Prints a JSON object: drawn tokens/s, up to each answer's end token (the first batch is not counted).
"""
import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model_dir, data, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
batches = int(sys.argv[4]) if len(sys.argv) > 4 else 3
torch.set_num_threads(2)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
rows = [json.loads(line)["messages"][:1] for line in open(data, encoding="utf-8")]
texts = [tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in rows]
ends = model.generation_config.eos_token_id
ends = set(ends if isinstance(ends, list) else [ends])
tokens, seconds = 0, 0.0
for i in range(batches + 1):
    part = [texts[(8 * i + k) % len(texts)] for k in range(8)]
    inputs = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length,
                             pad_token_id=tokenizer.pad_token_id)
    if i > 0:
        seconds += time.perf_counter() - start
        for answer in out[:, inputs.input_ids.shape[1]:].tolist():
            at = next((k + 1 for k, token in enumerate(answer) if token in ends), len(answer))
            tokens += at
print(json.dumps({"transformers": transformers.__version__, "tokens_per_second": tokens / seconds}))
