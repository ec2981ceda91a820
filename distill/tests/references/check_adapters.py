#!/usr/bin/env python3
"""Trains a few steps of every form of adapter with pipit-distill, loads each into PEFT, and compares: the keys are the
ones that PEFT would write, and the loss on held-out text is the one that `pipit-distill eval` reports.

    check_adapters.py PIPIT_DISTILL MODEL_DIR TRAIN.jsonl WORK_DIR
"""
import json
import pathlib
import subprocess
import sys

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

program, base, train, work = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
torch.set_num_threads(2)

TEXTS = ["The light in the kitchen is on.", "A thermostat keeps the room at twenty degrees.", "Open the blinds, please."]
VARIANTS = {
    "lora": ["--method", "lora", "--r", "4", "--use-rslora", "--rank-pattern", '{"v_proj": 2}',
             "--alpha-pattern", r'{"layers\\.3\\..*": 5}', "--exclude-modules", "k_proj"],
    "dora": ["--method", "lora", "--r", "4", "--use-dora", "--target-modules", "q_proj,down_proj",
             "--layers-to-transform", "0,7,29", "--lora-dropout", "0.1"],
    "whole": ["--method", "lora", "--r", "2", "--target-modules", r".*\.5\..*_proj", "--modules-to-save", "norm",
              "--lora-bias", "--init-lora-weights", "false"],
    "embedding": ["--method", "lora", "--r", "2", "--target-modules", "embed_tokens,lm_head,v_proj"],
    "prompt": ["--method", "prompt", "--num-virtual-tokens", "6", "--prompt-tuning-init", "TEXT",
               "--prompt-tuning-init-text", "Answer with a JSON object."],
    "prefix": ["--method", "prefix", "--num-virtual-tokens", "5"],
    "projection": ["--method", "prefix", "--num-virtual-tokens", "5", "--prefix-projection",
                   "--encoder-hidden-size", "32"],
}


def run(*arguments):
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def loss_in_peft(model, tokenizer):
    """Nats a token, with the end token after each text, which pipit-distill trains too."""
    total, tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1]:-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


def main():
    rows = work / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(base)
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = loss_in_peft(load(), tokenizer)
    for name, options in VARIANTS.items():
        folder = work / f"adapter-{name}"
        run("sft", "--model", base, "--data", train, "-o", folder, "--max-steps", 2, "--learning-rate", "1e-2",
            "--per-device-train-batch-size", 2, "--max-length", 128, "-q", *options)
        ours = json.loads(run("eval", "--model", base, "--adapter", folder, "--data", rows, "--no-generate", "--json", "-q"))
        # Of a new adapter of this configuration, PEFT would write these keys.
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        config.tokenizer_name_or_path = str(base) if hasattr(config, "tokenizer_name_or_path") else None
        wanted = set(get_peft_model_state_dict(get_peft_model(load(), config)))
        found = set(load_peft_weights(folder, device="cpu"))
        assert wanted == found, f"{name}: missing {sorted(wanted - found)}, unexpected {sorted(found - wanted)}"
        theirs = loss_in_peft(PeftModel.from_pretrained(load(), folder).eval(), tokenizer)
        assert abs(ours["loss"] - theirs) < 1e-4, f"{name}: loss {ours['loss']}, in PEFT {theirs}"
        assert abs(theirs - plain) > 1e-3, f"{name}: the adapter changes nothing: {theirs}, plain {plain}"
        print(f"{name}: {len(found)} tensors, none missing, none unexpected; loss {ours['loss']:.6f}, in PEFT {theirs:.6f}, "
              f"without {plain:.4f}")


main()
