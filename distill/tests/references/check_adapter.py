#!/usr/bin/env python3
"""Loads an adapter that pipit-distill wrote into PEFT: no missing key, no unexpected one, and the same loss.

    check_adapter.py MODEL_DIR RUN_DIR

Prints the number of adapter tensors and, for a fixed prompt, the mean of the absolute change of the logits that
the adapter makes (0 would mean that PEFT did not apply it).
"""
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

base_dir, run_dir = sys.argv[1:]
load = lambda: AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
model = get_peft_model(load(), LoraConfig.from_pretrained(run_dir))
weights = load_peft_weights(run_dir, device="cpu")
result = set_peft_model_state_dict(model, weights)
wanted = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
missing, unexpected = wanted - set(weights), set(weights) - wanted
assert not missing and not unexpected and not result.unexpected_keys, (missing, unexpected, result.unexpected_keys)
ids = torch.arange(5, 25).unsqueeze(0)
with torch.no_grad():
    plain = load()(ids).logits
    adapted = PeftModel.from_pretrained(load(), run_dir).eval()(ids).logits
print(f"{len(weights)} tensors, none missing, none unexpected; logits change by {(adapted - plain).abs().mean():.4f}")
