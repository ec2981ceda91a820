"""Makes convert/tests/fixtures/adapters: PEFT adapters of every kind, and what PEFT's merge makes of them.

    python make_adapters.py

Needs torch, transformers, peft and safetensors (seen with 2.15.0, 5.23.0, 0.21.2, 0.8.0), and the checkpoints that
make_fixtures.py and make_architectures.py made. Each folder holds an adapter as PEFT saves it, base.txt (the folder of
its base) and merged.safetensors: merge_and_unload in f32, those tensors that differ from the base.

PEFT merges into the tensor that embeddings and output share. That is not the model that was trained: there the output
keeps its weights, unless tokens are trained or ensure_weight_tying is set. So the merge is done on a copy of the base
whose output is its own, and the script checks that its logits are those of the adapter unmerged.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ADAPTERS = FIXTURES / "adapters"
LLAMA, UNTIED, QWEN2, PHI3, GEMMA3 = "tied", "untied", "architectures/qwen2", "architectures/phi", "architectures/gemma3"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Name: base, then PEFT's LoraConfig.
VARIANTS = {
    "plain": (LLAMA, dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])),
    "rslora": (LLAMA, dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "o_proj"],
                           rank_pattern={r"layers\.1\.self_attn\.k_proj": 2},
                           alpha_pattern={"o_proj": 3, ".*k_proj": 5})),
    "regex": (LLAMA, dict(r=2, lora_alpha=4, target_modules=r".*\.layers\.\d+\.self_attn\.(v|o)_proj")),
    "layers": (LLAMA, dict(r=2, lora_alpha=4, target_modules=["up_proj", "v_proj"], layers_to_transform=[1],
                           layers_pattern="layers")),
    "fan-in": (LLAMA, dict(r=2, lora_alpha=4, target_modules=["gate_proj"], fan_in_fan_out=True)),
    "dora": (LLAMA, dict(r=4, lora_alpha=8, use_dora=True, target_modules=ALL_LINEAR)),
    "embeddings": (LLAMA, dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"])),
    "embeddings-dora": (LLAMA, dict(r=2, lora_alpha=4, use_dora=True, target_modules=["embed_tokens"])),
    "tying": (LLAMA, dict(r=2, lora_alpha=4, target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "head": (LLAMA, dict(r=4, lora_alpha=8, target_modules=["lm_head", "v_proj"])),
    "ends": (UNTIED, dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"], use_rslora=True,
                          alpha_pattern={"q_proj": 3})),
    "saved-norms": (GEMMA3, dict(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"],
                                 modules_to_save=["input_layernorm", "q_norm"])),
    "saved-embeddings": (LLAMA, dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "saved-head": (LLAMA, dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tokens": (LLAMA, dict(r=2, lora_alpha=4, target_modules=["q_proj"],
                           trainable_token_indices={"embed_tokens": [3, 270, 1]})),
    "bias-all": (QWEN2, dict(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], bias="all")),
    "bias-lora-only": (QWEN2, dict(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], bias="lora_only")),
    "lora-bias": (QWEN2, dict(r=2, lora_alpha=6, target_modules=["k_proj", "v_proj"], lora_bias=True)),
    "fused": (PHI3, dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "gate_up_proj", "o_proj", "down_proj"])),
}
TEXT = torch.tensor([[5, 3, 270, 41, 1, 7, 200]])


def base_model(base, untie):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / base, dtype=torch.float32)
    if untie and model.config.tie_word_embeddings:
        head = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = head
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(TEXT.clamp(max=model.config.vocab_size - 1)).logits


def make(name, base, options):
    folder = ADAPTERS / name
    torch.manual_seed(11)
    model = get_peft_model(base_model(base, untie=False), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    model.eval()
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = folder / "adapter_config.json"
    text = config.read_text().replace(str(FIXTURES / base), base)
    if options.get("fan_in_fan_out"):
        # PEFT turns it off for linear layers, in a copy: the file that it loads may say true.
        text = text.replace('"fan_in_fan_out": false', '"fan_in_fan_out": true')
        assert '"fan_in_fan_out": true' in text
    config.write_text(text)
    (folder / "base.txt").write_text(base + "\n")
    before = base_model(base, untie="trainable_token_indices" not in options)
    start = {key: value.clone() for key, value in before.state_dict().items()}
    merged = PeftModel.from_pretrained(before, folder).merge_and_unload()
    if "ensure_weight_tying" in options:
        # On a base whose output is its own PEFT leaves the output alone.
        merged.lm_head.weight.data.copy_(merged.get_input_embeddings().weight)
    difference = (logits(model) - logits(merged)).abs().max().item()
    end = merged.state_dict()
    changed = {key: value.contiguous() for key, value in end.items() if not torch.equal(value, start[key])}
    if {"ensure_weight_tying", "trainable_token_indices"} & options.keys():
        changed.pop("lm_head.weight")
    print(f"{name}: {len(load_file(folder / 'adapter_model.safetensors'))} tensors, {len(changed)} changed: "
          f"logits differ by {difference:.1e}")
    assert difference < 1e-4, name
    save_file(changed, folder / "merged.safetensors")


def resized(name):
    """An adapter with new tokens: embeddings and output saved whole, and the tokenizer beside them."""
    folder = ADAPTERS / name
    torch.manual_seed(12)
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / LLAMA)
    tokenizer.add_tokens(["<tool>", "kitchenette"])
    model = base_model(LLAMA, untie=False)
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"],
                                             modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(FIXTURES / LLAMA), LLAMA))
    (folder / "base.txt").write_text(LLAMA + "\n")
    before = base_model(LLAMA, untie=True)
    start = {key: value.clone() for key, value in before.state_dict().items()}
    before.resize_token_embeddings(len(tokenizer))
    merged = PeftModel.from_pretrained(before, folder).merge_and_unload()
    end = merged.state_dict()
    changed = {key: value.contiguous() for key, value in end.items()
               if value.shape != start[key].shape or not torch.equal(value, start[key])}
    print(f"{name}: {len(changed)} changed, {len(tokenizer)} tokens")
    save_file(changed, folder / "merged.safetensors")


def main():
    wanted = sys.argv[1:]
    if not wanted:
        shutil.rmtree(ADAPTERS, ignore_errors=True)
    for name, (base, options) in VARIANTS.items():
        if not wanted or name in wanted:
            shutil.rmtree(ADAPTERS / name, ignore_errors=True)
            make(name, base, options)
    if not wanted or "resized" in wanted:
        shutil.rmtree(ADAPTERS / "resized", ignore_errors=True)
        resized("resized")


if __name__ == "__main__":
    main()
