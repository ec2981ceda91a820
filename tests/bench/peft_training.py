#!/usr/bin/env python3
"""Train a LoRA adapter with torch + PEFT, as fast as they do it on this CPU: the peer of `pipit-distill sft`.

In:  a checkpoint folder (of `pipit-convert import`) and chat JSONL, the same two that pipit-distill gets.
Out: one JSON object on stdout: tokens/s (without padding), seconds a step, peak resident memory.

Rows are taken in the file's order, `--batch` at a time, padded to the longest of the batch; the loss is on the
assistant's tokens only; AdamW on the adapter alone, float32. Needs the packages of scripts/references.txt:

  peft_training.py --model quickstart-work/base --data quickstart-work/data/train.jsonl --steps 12
  pipit-distill sft --model quickstart-work/base --data quickstart-work/data/train.jsonl --method lora \\
      --max-steps 12 -o /tmp/run --json
"""

import argparse
import json
import os
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100
WARM_UP = 2  # steps that are not timed


def encode(tokenizer, messages):
    """(token ids, labels) of one conversation: labels are IGNORED up to the assistant's answer."""
    def render(part, **more):
        return tokenizer.apply_chat_template(part, tokenize=False, **more)

    prompt = tokenizer(render(messages[:-1], add_generation_prompt=True), add_special_tokens=False).input_ids
    whole = tokenizer(render(messages), add_special_tokens=False).input_ids
    if whole[: len(prompt)] != prompt:
        sys.exit("error: the chat template does not put the answer behind the prompt")
    return whole, [IGNORED] * len(prompt) + whole[len(prompt) :]


def batches(rows, size, steps):
    """`steps` batches of input ids, labels and attention mask, right-padded; wraps round the rows."""
    for step in range(steps):
        chosen = [rows[(step * size + k) % len(rows)] for k in range(size)]
        longest = max(len(ids) for ids, _ in chosen)
        yield (
            torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen]),
            torch.tensor([labels + [IGNORED] * (longest - len(ids)) for ids, labels in chosen]),
            torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in chosen]),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data, encoding="utf-8") as file:
        rows = [encode(tokenizer, json.loads(line)["messages"]) for line in file]
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)

    tokens, seconds, losses = 0, 0.0, []
    for step, (ids, labels, mask) in enumerate(batches(rows, args.batch, WARM_UP + args.steps)):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step >= WARM_UP:
            seconds += time.perf_counter() - started
            tokens += int(mask.sum())
    print(json.dumps({
        "peer": f"torch {torch.__version__} + peft",
        "threads": args.threads,
        "steps": args.steps,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_per_step": round(seconds / args.steps, 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


if __name__ == "__main__":
    main()
