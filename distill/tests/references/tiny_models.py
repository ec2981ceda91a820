#!/usr/bin/env python3
"""Golden numbers of tiny random models of every architecture, made with torch, transformers and PEFT.

    python tiny_models.py ../fixtures [NAME...]

Writes, for each model of MODELS (d = 64, 256 tokens, grouped queries) or those that are named:
NAME/                     the checkpoint (config.json, model.safetensors)
NAME.expected.safetensors input ids, mask, labels (right-padded), logits, those of the same rows padded on the
                          left with other tokens, loss, the gradient of every weight, and the weights after 20 steps of AdamW
                          with clipping
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
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

OUT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
torch.set_num_threads(1)

COMMON = {"vocab_size": 256, "hidden_size": 64, "max_position_embeddings": 128, "attention_dropout": 0.0,
          "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
LLAMA = COMMON | {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "rms_norm_eps": 1e-5}
QWEN = LLAMA | {"intermediate_size": 48, "rms_norm_eps": 1e-6}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
ALL = {"r": 2, "target_modules": "all-linear"}

# name → seed, configuration, adapter. The windows are shorter than the longest rows, so that they matter.
MODELS = {
    "tiny-tied": (21, LlamaConfig(**LLAMA, head_dim=16, tie_word_embeddings=True, rope_parameters=PLAIN),
                  ALL | {"r": 4}),
    # Llama 3's stretched rope, and a head_dim that is not d / heads.
    "tiny-untied": (20, LlamaConfig(**LLAMA, head_dim=24, tie_word_embeddings=False, rope_parameters=LLAMA3),
                    {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
    "tiny-qwen2": (22, Qwen2Config(**QWEN, tie_word_embeddings=True, rope_parameters=PLAIN), ALL),
    # The second layer sees a window.
    "tiny-qwen2-untied": (23, Qwen2Config(**QWEN, tie_word_embeddings=False, rope_parameters=PLAIN,
                                          use_sliding_window=True, sliding_window=7, max_window_layers=1),
                          ALL | {"use_rslora": True}),
    "tiny-qwen3": (24, Qwen3Config(**QWEN, head_dim=24, tie_word_embeddings=True,
                                   rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}), ALL),
    # Two layers with a window and a rope of their own, then one that sees everything, its rope stretched.
    "tiny-gemma3": (25, Gemma3TextConfig(
        **COMMON, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
        rms_norm_eps=1e-6, tie_word_embeddings=True, query_pre_attn_scalar=20, sliding_window=6,
        sliding_window_pattern=3, pad_token_id=0,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                         "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}), ALL),
}


def randomise(model):
    """Every weight random. Norms stand around the number that leaves the input as it is."""
    plus_one = model.config.model_type == "gemma3_text"
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.normal_(0.0, 0.08)
            if name.endswith("norm.weight") and not plus_one:
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


@torch.no_grad()
def logits_left(model, ids, mask):
    """The logits of the rows' tokens, `[tokens, vocabulary]`, where the rows are padded on the left, and with other
    tokens. Positions count from the first real token, as `generate` counts them."""
    left = lambda x: torch.stack([row.roll(len(row) - int(real.sum()), 0) for row, real in zip(x, mask)])
    left_ids, left_mask = left(ids), left(mask)
    left_ids[left_mask == 0] = torch.arange(3, 3 + int((left_mask == 0).sum()))
    positions = (left_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=left_ids, attention_mask=left_mask, position_ids=positions).logits
    return logits[left_mask == 1]


def save(tensors, name):
    save_file({k: v.contiguous() for k, v in tensors.items()}, OUT / f"{name}.expected.safetensors")


def full(name, seed, config):
    """The checkpoint and everything about it; returns the rows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model)
    shutil.rmtree(OUT / name, ignore_errors=True)
    model.save_pretrained(OUT / name)
    ids, mask, labels = batch()
    logits, loss = loss_of(model, ids, mask, labels)
    loss.backward()
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits": logits.detach(),
           "logits_left": logits_left(model, ids, mask), "loss": loss.detach().reshape(1)}
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
    save(out, name)
    return ids, mask, labels


def lora(name, options, rows):
    """An adapter on the checkpoint, and what PEFT makes of it."""
    folder = OUT / f"{name}-lora"
    base = AutoModelForCausalLM.from_pretrained(OUT / name, attn_implementation="eager").float().eval()
    peft = get_peft_model(base, LoraConfig(lora_alpha=12, lora_dropout=0.0, task_type="CAUSAL_LM", **options)).eval()
    for key, p in peft.named_parameters():
        if "lora_" in key:
            with torch.no_grad():
                p.normal_(0.0, 0.1)
    shutil.rmtree(folder, ignore_errors=True)
    peft.save_pretrained(folder)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = name
    if isinstance(adapter["target_modules"], list):
        adapter["target_modules"].sort()  # a set in PEFT: its order changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)
    logits, loss = loss_of(peft, *rows)
    loss.backward()
    out = {"logits": logits.detach(), "loss": loss.detach().reshape(1)}
    for key, p in peft.named_parameters():
        if p.requires_grad:
            out["grad." + key.replace("base_model.model.", "").replace(".default", "")] = p.grad.clone()
    save(out, f"{name}-lora")


for name in sys.argv[2:] or MODELS:
    seed, config, adapter = MODELS[name]
    lora(name, adapter, full(name, seed, config))
