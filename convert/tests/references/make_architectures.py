"""Makes convert/tests/fixtures/architectures: a tiny checkpoint of every architecture, and what llama.cpp's converter
and transformers make of it.

    python make_architectures.py LLAMA_CPP_DIR [NAME...]

LLAMA_CPP_DIR is a source tree of llama.cpp with convert_hf_to_gguf.py. Needs torch, transformers, safetensors and gguf
(seen with 2.15.0, 5.23.0, 0.8.0, 0.19.0).

    tokenizer/              the byte-level BPE that all of them share
    NAME/                   config.json, generation_config.json, model.safetensors: written by transformers
    NAME/expected.json      convert_hf_to_gguf.py: every key but the vocabulary, and of every tensor type,
                            dimensions and the start of the sha256
    NAME/logits.safetensors transformers: a prompt, and its logits in f32 for every STEP-th token of the vocabulary;
                            for gemma also with the activation rounded as in llama.cpp

    ../llama3_factors.json  llama.cpp's converter: the frequency factors of Llama 3's scaling, as the bits of f32

The weights are random, with no symmetry and nothing at its default: norms and biases too.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers as t
from convert_hf import convert
from make_fixtures import CORPUS, TEMPLATE
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "architectures"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT = 24
STEP = 8
#: Of these also F16 and Q8_0, with rows of which some are no whole number of blocks.
ALL_TYPES = ["gemma3-linear", "phi-long", "lfm2"]
SMALL = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128)
OLD = dict(rope_type="default", rope_theta=5000.0)
YARN = dict(rope_type="yarn", rope_theta=20000.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=6.0, low_freq_factor=2.0, high_freq_factor=5.0,
              original_max_position_embeddings=96)
GEMMA3_ROPE = dict(full_attention=dict(rope_type="default", rope_theta=200000.0),
                   sliding_attention=dict(rope_type="default", rope_theta=3000.0))


def longrope(original):
    return dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=original,
                short_factor=[1.0 + 0.05 * i for i in range(6)], long_factor=[1.5 + 0.7 * i * i for i in range(6)],
                partial_rotary_factor=0.75)


# name: (class of the model, class of its configuration, type of the weights, what differs from SMALL)
CHECKPOINTS = {
    "llama-linear": (t.LlamaForCausalLM, t.LlamaConfig, "float32", dict(
        hidden_size=16, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5))),
    "llama-yarn": (t.LlamaForCausalLM, t.LlamaConfig, "float16", dict(head_dim=16, rope_parameters=YARN)),
    "llama-factors": (t.LlamaForCausalLM, t.LlamaConfig, "bfloat16", dict(
        head_dim=32, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)),
    "mistral": (t.MistralForCausalLM, t.MistralConfig, "bfloat16", dict(
        head_dim=12, sliding_window=None, num_key_value_heads=1, rope_parameters=OLD)),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, "bfloat16", dict(tie_word_embeddings=True, rope_parameters=OLD)),
    "qwen2-yarn": (t.Qwen2ForCausalLM, t.Qwen2Config, "float32", dict(
        hidden_size=16, rope_parameters=YARN)),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, "bfloat16", dict(
        head_dim=12, tie_word_embeddings=True, rope_parameters=OLD)),
    "qwen3-untied": (t.Qwen3ForCausalLM, t.Qwen3Config, "float32", dict(
        hidden_size=16, head_dim=16, rope_parameters=YARN)),
    "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, "bfloat16", dict(
        num_hidden_layers=3, head_dim=12, query_pre_attn_scalar=12, sliding_window=8, attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0)),
    "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, "bfloat16", dict(
        num_hidden_layers=7, hidden_size=24, intermediate_size=32, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=8, rope_parameters=GEMMA3_ROPE)),
    "gemma3-linear": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, "float32", dict(
        num_hidden_layers=6, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        head_dim=12, query_pre_attn_scalar=12, sliding_window=8, final_logit_softcapping=4.0,
        rope_parameters=dict(GEMMA3_ROPE, full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0)))),
    # llama.cpp looks for <unk> and <s> in a model that is called phi3.
    "phi": (t.Phi3ForCausalLM, t.Phi3Config, "bfloat16", dict(
        sliding_window=None, original_max_position_embeddings=128, pad_token_id=0, rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0))),
    "phi-long": (t.Phi3ForCausalLM, t.Phi3Config, "bfloat16", dict(
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters=longrope(16))),
    "phi-short": (t.Phi3ForCausalLM, t.Phi3Config, "bfloat16", dict(
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        max_position_embeddings=16384, pad_token_id=0,
        original_max_position_embeddings=2048, rope_parameters=longrope(2048))),
    "smollm3": (t.SmolLM3ForCausalLM, t.SmolLM3Config, "bfloat16", dict(
        num_hidden_layers=5, hidden_size=24, pad_token_id=0, rope_parameters=OLD)),
    "smollm3-untied": (t.SmolLM3ForCausalLM, t.SmolLM3Config, "float32", dict(
        num_hidden_layers=4, hidden_size=16, tie_word_embeddings=False, pad_token_id=0, rope_parameters=YARN)),
    "granite": (t.GraniteForCausalLM, t.GraniteConfig, "bfloat16", dict(
        tie_word_embeddings=True, rope_parameters=OLD, attention_multiplier=0.2, embedding_multiplier=3.0,
        residual_multiplier=0.7, logits_scaling=2.5)),
    "granite-biases": (t.GraniteForCausalLM, t.GraniteConfig, "float32", dict(
        hidden_size=16, attention_bias=True, mlp_bias=True, rope_parameters=OLD, attention_multiplier=0.3)),
    "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config, "bfloat16", dict(rope_parameters=OLD, pad_token_id=0)),
    "olmo2-yarn": (t.Olmo2ForCausalLM, t.Olmo2Config, "float32", dict(
        hidden_size=16, rope_parameters=YARN, pad_token_id=0)),
    "lfm2": (t.Lfm2ForCausalLM, t.Lfm2Config, "bfloat16", dict(
        num_hidden_layers=5, layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
        intermediate_size=60, block_multiple_of=16, rope_parameters=OLD)),
    "lfm2-untied": (t.Lfm2ForCausalLM, t.Lfm2Config, "float32", dict(
        num_hidden_layers=3, hidden_size=16, layer_types=["full_attention", "conv", "conv"], conv_L_cache=4,
        block_auto_adjust_ff_dim=False, tie_word_embeddings=False, rope_parameters=YARN)),
}


def tokenizer(folder):
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    whole = t.PreTrainedTokenizerFast(
        tokenizer_object=fast, clean_up_tokenization_spaces=False, bos_token="<|im_start|>", eos_token="<|im_end|>",
        unk_token="<|endoftext|>", pad_token="<|im_end|>")
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)
    return fast.get_vocab_size()


def randomise(model):
    """One-dimensional weights (norms, biases) near 1 or 0, the rest so that logits are of the order of 1."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.02, weight.shape[-1] ** -0.5)
            else:
                gemma = "Gemma" in type(model).__name__
                weight.normal_(0.9 if "norm" in name and not gemma else 0.05, 0.2)


class F16Gelu(torch.nn.Module):
    """GELU as ggml's table has it: argument and value in f16."""

    def forward(self, x):
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def checkpoint(name, folder, vocab_size):
    model_class, config_class, dtype, own = CHECKPOINTS[name]
    config = config_class(**dict(SMALL, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2) | own)
    torch.manual_seed(sum(map(ord, name)))
    model = model_class(config)
    randomise(model)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = torch.randint(3, vocab_size, (PROMPT,))
    with torch.no_grad():
        logits = model(prompt[None]).logits[0]
        result = {"prompt": prompt.to(torch.int32), "logits": logits[:, ::STEP].contiguous()}
        if name.startswith("gemma"):
            for module in model.modules():
                if hasattr(module, "act_fn"):
                    module.act_fn = F16Gelu()
            result["logits_f16_gelu"] = model(prompt[None]).logits[0, :, ::STEP].contiguous()
    save_file(result, folder / "logits.safetensors")
    print(f"{name}: logits up to {logits.abs().max():.2f}, deviation {logits.std():.2f}")


def llama3_factors():
    """rope_freqs.weight of published models, by the code of llama.cpp's converter."""
    from conversion.llama import LlamaModel

    cases = []
    for head_dim, theta, factor, low, high, context in [
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B
        (128, 500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 3B
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (32, 5000.0, 6.0, 2.0, 5.0, 96),
        (80, 10000.0, 2.5, 1.0, 3.75, 1000),
    ]:
        model = LlamaModel.__new__(LlamaModel)
        model.block_count, model.hparams = 1, {"head_dim": head_dim}
        model.rope_parameters = dict(rope_type="llama3", rope_theta=theta, factor=factor, low_freq_factor=low,
                                     high_freq_factor=high, original_max_position_embeddings=context)
        [(_, tensor)] = model.generate_extra_tensors()
        cases.append(dict(head_dim=head_dim, theta=theta, factor=factor, low=low, high=high, context=context,
                          bits=tensor.view(torch.int32).tolist()))
    return cases


def main():
    llama_cpp = Path(sys.argv[1]).resolve()
    shutil.rmtree(FIXTURES / "tokenizer", ignore_errors=True)
    vocab_size = tokenizer(FIXTURES / "tokenizer")
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    (FIXTURES.parent / "llama3_factors.json").write_text(json.dumps(llama3_factors()) + "\n", encoding="utf-8")
    for name in sys.argv[2:] or CHECKPOINTS:
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoint(name, folder, vocab_size)
        result = {"tensors": {}}
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / name
            shutil.copytree(FIXTURES / "tokenizer", whole)
            shutil.copytree(folder, whole, dirs_exist_ok=True)
            for kind in ["f32", *(["f16", "q8_0"] if name in ALL_TYPES else []), "bf16"]:
                keys, tensors = convert(llama_cpp, whole, kind, "smollm")
                result["tensors"][kind] = {name: f"{tensor['type']} {tensor['dimensions']} {tensor['sha256'][:16]}"
                                           for name, tensor in tensors.items()}
        result["keys"] = {key: f"{value['type']}{'[]' * value['array']} {json.dumps(value['value'])}"
                          for key, value in keys.items() if not key.startswith("tokenizer.")}
        (folder / "expected.json").write_text(json.dumps(result, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
