"""Makes convert/tests/fixtures: tiny checkpoints, and what llama.cpp makes of them. make_adapters.py comes next.

    python make_fixtures.py LLAMA_CPP_DIR

LLAMA_CPP_DIR is a source tree of llama.cpp with convert_hf_to_gguf.py. Needs torch, transformers, tokenizers
and gguf (seen with 2.15.0, 5.23.0, 0.22, 0.19.0).

    tied/     F32, tied embeddings, grouped-query attention, tokenizer cut as SmolLM2's
    untied/   BF16, own output matrix, biases, a head size of its own, Llama 3's frequency scaling, a padded
              vocabulary, tokenizer cut as Llama 3's, with a begin-of-sequence token
    */expected.json          convert_hf_to_gguf.py: every key, and of every tensor type, shape and sha256
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from convert_hf import convert
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
            "'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CORPUS = ["Zet het licht in de keuken aan.", "Turn on the kitchen light, please!", "Schalte das Licht ein.",
          "Allume la lumière dans la cuisine.", "It is 21 degrees in the living room.", "we'll see what's there"] * 8
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


def tokenizer(folder, llama3):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
    first = pre_tokenizers.Split(Regex(LLAMA3), "isolated") if llama3 else pre_tokenizers.Digits(True)
    fast = Tokenizer(models.BPE(ignore_merges=llama3))
    fast.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[] if llama3 else SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if llama3:
        fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|odd|>", normalized=False)])
        bos = ("<|endoftext|>", fast.token_to_id("<|endoftext|>"))
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos])
    roles = dict(bos_token="<|endoftext|>" if llama3 else "<|im_start|>", eos_token="<|im_end|>",
                 unk_token="<|endoftext|>", pad_token="<|im_end|>")
    whole = PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **roles)
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)
    return fast


def checkpoint(name, llama3):
    folder = FIXTURES / name
    folder.mkdir(parents=True)
    fast = tokenizer(folder, llama3)
    own = dict(
        head_dim=12, attention_bias=True, mlp_bias=True, hidden_size=36, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ) if llama3 else dict(hidden_size=32, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    config = LlamaConfig(
        vocab_size=fast.get_vocab_size() + (7 if llama3 else 0), intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16384, rms_norm_eps=1e-5,
        tie_word_embeddings=not llama3, bos_token_id=fast.token_to_id("<|endoftext|>" if llama3 else "<|im_start|>"),
        eos_token_id=fast.token_to_id("<|im_end|>"), **own)
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.01, 0.3)  # nothing symmetric, nothing at its default
    model.generation_config.pad_token_id = config.eos_token_id
    if llama3:
        model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
        model.generation_config.top_p = 0.9
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def expected(llama_cpp, folder, pre):
    result = {"tensors": {}}
    for kind in ["f32", "f16", "bf16", "q8_0"]:
        result["keys"], result["tensors"][kind] = convert(llama_cpp, folder, kind, pre)
    (folder / "expected.json").write_text(json.dumps(result, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def main():
    llama_cpp = Path(sys.argv[1]).resolve()
    for name in ["tied", "untied"]:
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
    expected(llama_cpp, checkpoint("tied", llama3=False), "smollm")
    expected(llama_cpp, checkpoint("untied", llama3=True), "llama-bpe")


if __name__ == "__main__":
    main()
