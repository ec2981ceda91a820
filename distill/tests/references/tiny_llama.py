#!/usr/bin/env python3
"""Golden numbers of a tiny random llama, made with torch, transformers and PEFT.

    python tiny_llama.py ../fixtures

Writes, for a tied and an untied model (2 layers, d = 64, 4 query and 2 key-value heads, 256 tokens):
NAME/                     the checkpoint (config.json, model.safetensors)
NAME.expected.safetensors input ids, mask, labels (right-padded), logits, loss, the gradient of every weight,
                          and the weights after 20 steps of AdamW with clipping
NAME-lora/                a PEFT adapter with random A and B
NAME-lora.expected.safetensors  logits, loss, and the gradients of every A and B
Seen with torch 2.15, transformers 5.23, peft 0.21.
"""
import json
import pathlib
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
torch.set_num_threads(1)


def model_config(tied):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if not tied:  # the untied one has Llama 3's stretched rope and a head_dim that is not d / heads
        rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16 if tied else 24,
                       max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tied,
                       rope_parameters=rope, attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
                       attn_implementation="eager")


def randomise(model):
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.normal_(0.0, 0.08)
            if p.ndim == 1:
                p.add_(1.0)


def batch():
    lengths = [13, 21, 5]
    ids = torch.randint(3, 256, (3, 21))
    mask = torch.zeros(3, 21, dtype=torch.long)
    labels = torch.full((3, 21), -100)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, length:] = 2
        labels[row, length // 2:length] = ids[row, length // 2:length]
    labels[1, 0] = ids[1, 0]  # a label that nothing precedes: never counted
    return ids, mask, labels


def loss_of(model, ids, mask, labels):
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), labels[:, 1:].reshape(-1),
                                             ignore_index=-100)
    return logits, loss


def main():
    for name, tied in [("tiny-tied", True), ("tiny-untied", False)]:
        torch.manual_seed(20 + tied)
        model = LlamaForCausalLM(model_config(tied)).float().eval()
        randomise(model)
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        ids, mask, labels = batch()
        logits, loss = loss_of(model, ids, mask, labels)
        loss.backward()
        out = {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits": logits.detach(),
               "loss": loss.detach().reshape(1)}
        for key, p in model.named_parameters():
            out[f"grad.{key}"] = p.grad.clone()
        decay = [p for p in model.parameters() if p.ndim >= 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                      lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
        norms = []
        for _ in range(20):
            optimizer.zero_grad()
            _, loss = loss_of(model, ids, mask, labels)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
        out["grad_norms"] = torch.stack(norms)
        for key, p in model.named_parameters():
            out[f"after.{key}"] = p.detach().clone()
        save_file({k: v.contiguous() for k, v in out.items()}, OUT / f"{name}.expected.safetensors")

        base = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
        config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, use_rslora=not tied, task_type="CAUSAL_LM",
                            target_modules="all-linear" if tied else ["q_proj", "v_proj", "down_proj"])
        peft = get_peft_model(base, config).eval()
        for key, p in peft.named_parameters():
            if "lora_" in key:
                with torch.no_grad():
                    p.normal_(0.0, 0.1)
        shutil.rmtree(OUT / f"{name}-lora", ignore_errors=True)
        peft.save_pretrained(OUT / f"{name}-lora")
        config_path = OUT / f"{name}-lora" / "adapter_config.json"
        adapter = json.loads(config_path.read_text())
        adapter["base_model_name_or_path"] = name
        if isinstance(adapter["target_modules"], list):
            adapter["target_modules"].sort()  # a set in PEFT: its order changes from run to run
        config_path.write_text(json.dumps(adapter, indent=2) + "\n")
        (OUT / f"{name}-lora" / "README.md").unlink(missing_ok=True)
        logits, loss = loss_of(peft, ids, mask, labels)
        loss.backward()
        out = {"logits": logits.detach(), "loss": loss.detach().reshape(1)}
        for key, p in peft.named_parameters():
            if p.requires_grad:
                out["grad." + key.replace("base_model.model.", "").replace(".default", "")] = p.grad.clone()
        save_file({k: v.contiguous() for k, v in out.items()}, OUT / f"{name}-lora.expected.safetensors")


main()
