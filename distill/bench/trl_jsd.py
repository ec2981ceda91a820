#!/usr/bin/env python3
"""torch + TRL's loss on the shapes of the benchmark: full fine-tuning of a student against a teacher, both MODEL_DIR,
f32, batch 4 x 128 tokens, AdamW.

    trl_jsd.py MODEL_DIR ROWS.jsonl [STEPS [adamw_torch|adamw_8bit]]

ROWS.jsonl has rows with `prompt` and `completion` of at least 128 tokens together. Prints a JSON object: tokens/s (the
first step is not counted) and the peak resident memory.
"""
import json
import os
import resource
import sys
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd.gkd_trainer import GKDTrainer

model_dir, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
torch.set_num_threads(2)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
rows = [json.loads(line) for line in open(data, encoding="utf-8")]
rows = [tokenizer(row["prompt"] + row["completion"]).input_ids[:128] for row in rows]
rows = [row for row in rows if len(row) == 128]
student = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
teacher = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval().requires_grad_(False)
if len(sys.argv) > 4 and sys.argv[4] == "adamw_8bit":
    import bitsandbytes
    # As transformers' Trainer: the embedding keeps its moments in f32.
    bitsandbytes.optim.GlobalOptimManager.get_instance().register_module_override(
        student.get_input_embeddings(), "weight", {"optim_bits": 32})
    optimizer = bitsandbytes.optim.AdamW8bit(student.parameters(), lr=1e-5, weight_decay=0.0)
else:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
tokens, seconds = 0, 0.0
for step in range(steps + 1):
    start = time.perf_counter()
    ids = torch.tensor([rows[(step * 4 + i) % len(rows)] for i in range(4)])
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids).logits[:, :-1]
    student_logits = student(input_ids=ids).logits[:, :-1]
    loss = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels=ids[:, 1:], beta=0.5)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step > 0:
        tokens += ids.numel()
        seconds += time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"torch": torch.__version__.split("+")[0], "trl": trl.__version__, "loss": loss.item(),
                  "tokens_per_second": tokens / seconds, "peak_mib": peak}))
