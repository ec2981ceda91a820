#!/usr/bin/env python3
"""Golden numbers of every form of adapter that PEFT has and pipit-distill trains, on the tiny models.

    python peft_adapters.py ../fixtures

Needs the checkpoints of tiny_models.py there. Writes for every case
adapters/CASE/                      the adapter as PEFT saves it, every trained tensor moved away from its start
adapters/CASE.expected.safetensors  logits (without padding), loss, and the gradient of every trained tensor, with the
                                    base's batch; of a projected prefix also the tensors that the projection has
Seen with torch 2.15, transformers 5.23, peft 0.21.
"""
import json
import pathlib
import shutil
import sys

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

OUT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
torch.set_num_threads(1)


def lora(**options):
    return LoraConfig(**({"r": 3, "lora_alpha": 9, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"} | options))


# case: (base, configuration)
CASES = {
    "regex-rslora": ("tiny-untied", lora(target_modules=r".*\.1\.(self_attn|mlp)\.(q|down)_proj", use_rslora=True)),
    "all-linear": ("tiny-untied", lora(target_modules="all-linear", exclude_modules=["k_proj", "layers.0.mlp.up_proj"])),
    "patterns": ("tiny-tied", lora(target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
                                   # In the order of the alphabet: PEFT sorts them when it saves.
                                   rank_pattern={r"layers\.1\.mlp\.up_proj": 5, "up_proj": 1, "v_proj": 2},
                                   alpha_pattern={r"^model\.layers\.0\..*": 2.5, "self_attn.q_proj": 5})),
    "layers": ("tiny-tied", lora(target_modules=["q_proj", "gate_proj", "model.layers.0.mlp.down_proj"],
                                 layers_to_transform=[1], layers_pattern="layers")),
    "dora": ("tiny-tied", lora(target_modules="all-linear", use_dora=True)),
    "lora-bias": ("tiny-tied", lora(target_modules=["q_proj", "up_proj"], lora_bias=True)),
    "modules-to-save": ("tiny-untied", lora(target_modules=["v_proj", "lm_head"],
                                            modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "modules-to-save-tied": ("tiny-tied", lora(target_modules=["o_proj"], modules_to_save=["lm_head"])),
    "embeddings": ("tiny-tied", lora(target_modules=["embed_tokens", "lm_head", "down_proj"])),
    "embeddings-dora": ("tiny-untied", lora(target_modules=["embed_tokens", "lm_head", "k_proj"], use_dora=True)),
    "bias-all": ("tiny-qwen2", lora(target_modules=["q_proj", "down_proj"], bias="all")),
    "bias-lora-only": ("tiny-qwen2", lora(target_modules=["v_proj", "o_proj"], bias="lora_only", lora_bias=True)),
    "gemma3-embeddings": ("tiny-gemma3", lora(target_modules=["embed_tokens", "k_proj"], use_dora=True)),
    "gemma3-norms": ("tiny-gemma3", lora(target_modules=["v_proj"], modules_to_save=["q_norm", "model.norm"])),
    "gemma3-prompt": ("tiny-gemma3", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "gemma3-prefix": ("tiny-gemma3", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)),
    "prompt": ("tiny-tied", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prefix": ("tiny-untied", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prefix-projection": ("tiny-tied", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3,
                                                          prefix_projection=True, encoder_hidden_size=12)),
}


def move(name, p):
    """Away from the start, where B is zero and DoRA is the base."""
    with torch.no_grad():
        if "lora_magnitude_vector" in name or name.endswith(("norm.weight", "bias")) or "modules_to_save" in name:
            p.mul_(1 + 0.2 * torch.randn_like(p)).add_(0.02 * torch.randn_like(p))
        elif "prompt_encoder" in name:
            p.normal_(0.0, 0.4)
        else:
            p.normal_(0.0, 0.15)


def stored_name(name):
    """The name in the adapter's file, without `base_model.model.`."""
    name = name.replace("base_model.model.", "").replace(".default", "").replace(".modules_to_save", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def main():
    adapters = OUT / "adapters"
    shutil.rmtree(adapters, ignore_errors=True)
    for number, (case, (base, config)) in enumerate(CASES.items()):
        torch.manual_seed(100 + number)
        with safe_open(OUT / f"{base}.expected.safetensors", "pt") as file:
            ids, mask, labels = (file.get_tensor(name) for name in ("input_ids", "attention_mask", "labels"))
        model = AutoModelForCausalLM.from_pretrained(OUT / base, attn_implementation="eager", dtype=torch.float32)
        model = get_peft_model(model, config).eval()
        for name, p in model.named_parameters():
            if p.requires_grad:
                move(name, p)
        folder = adapters / case
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        path = folder / "adapter_config.json"
        saved = json.loads(path.read_text())
        saved["base_model_name_or_path"] = base
        for key in ("target_modules", "exclude_modules"):
            if isinstance(saved.get(key), list):
                saved[key].sort()  # a set in PEFT: its order changes from run to run
        path.write_text(json.dumps(saved, indent=2) + "\n")

        logits = model(input_ids=ids, attention_mask=mask).logits
        logits = logits[:, logits.shape[1] - ids.shape[1]:]  # without the rows of a soft prompt
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), labels[:, 1:].reshape(-1),
                                                 ignore_index=-100)
        loss.backward()
        out = {"logits": logits.detach()[mask == 1], "loss": loss.detach().reshape(1)}
        for name, p in model.named_parameters():
            if p.requires_grad:
                out["grad." + stored_name(name)] = p.grad.clone()
            else:
                assert p.grad is None or not p.grad.any(), name
            if "prompt_encoder" in name and config.peft_type == "PREFIX_TUNING" and config.prefix_projection:
                out["start." + stored_name(name)] = p.detach().clone()  # the file holds what the projection gives only
        save_file({key: value.contiguous() for key, value in out.items()}, adapters / f"{case}.expected.safetensors")
        print(case, round(loss.item(), 4), sorted(key for key in out if key.startswith("grad."))[:3])


main()
