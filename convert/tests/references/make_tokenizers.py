"""Makes convert/tests/fixtures/tokenizers: tiny tokenizers of every kind that is read, and the keys that llama.cpp's
convert_hf_to_gguf.py writes for them.

    python make_tokenizers.py LLAMA_CPP_DIR

Needs tokenizers, transformers, sentencepiece and gguf (seen with 0.23.3, 5.23.0, 0.2.3 and 0.19.0).

    spm/          SentencePiece's BPE as TinyLlama has it: tokenizer.model beside tokenizer.json
    spm-model/    the same, tokenizer.model alone
    spm-json/     the same, tokenizer.json alone
    spm-first/    the same, with the Metaspace that transformers writes since 2024 (legacy=False)
    gemma/        as Gemma 3 has it: pieces that users defined, no space before a text, a token without a row
    gpt-2/ ...    byte-level BPE, cut as llama.cpp's pre-tokenizer of that name; each has added tokens of every kind
    */expected.json   every tokenizer.* key of convert_hf_to_gguf.py --vocab-only
"""

import importlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)
from transformers.convert_slow_tokenizer import SentencePieceExtractor

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "tokenizers"
CORPUS = ["Zet het licht in de keuken aan, a.u.b.", "Turn on the kitchen light, please!  Don't wait.",
          "Schalte das Licht in der Küche ein.", "Allume la lumière dans la cuisine, s'il te plaît.",
          "It's 21.5 degrees in the living room; we'll see what's there at 12:30 or 1234567.",
          "def turn_on(self, room):\n    return self.lights[room].on()\n", "Включи свет на кухне. ПРИВЕТ",
          "打开厨房的灯。 キッチンの電気をつけて", "camelCase snake_case HTTPServer iPhone15", "a  b   c    d\t\te\n\n\nf"] * 6
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TOOLS = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}\n{% endfor %}"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
REGEX = {
    "llama-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL,
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
              rf"{CONTRACTIONS}?|\p{{N}}{{1,3}}" + TAIL.replace(r"[\r\n]*|", r"[\r\n/]*|"),
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
              + TAIL.replace(r"[\r\n]*|", r"[\r\n/]*|"),
}
BYTE_LEVEL = {
    # name: (ignore_merges, clean_up_tokenization_spaces)
    "gpt-2": (False, True), "smollm": (False, False), "refact": (False, True), "llama-bpe": (True, True),
    "dbrx": (False, True), "qwen2": (False, False), "gpt-4o": (False, False), "tekken": (True, False),
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=0) + "\n"
    path.write_text(text, encoding="utf-8")


def model_config(arch, vocab_size, **more):
    kind = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Gemma3ForCausalLM": "gemma3_text"}[arch]
    return dict(architectures=[arch], model_type=kind, vocab_size=vocab_size,
                hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rms_norm_eps=1e-5, sliding_window=32,
                rope_theta=10000.0, **more)


def byte_level(name):
    ignore_merges, clean = BYTE_LEVEL[name]
    folder = FIXTURES / name
    fast = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    cut = [pre_tokenizers.Split(Regex(REGEX[name]), "isolated")] if name in REGEX else []
    if name in ("smollm", "refact"):
        cut = [pre_tokenizers.Digits(True)]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in REGEX)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*cut, level]) if cut else level
    if name == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"] if name == "smollm" else []))
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False)
                             for text in ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_tool>"]])
    fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|odd|>", normalized=False),
                     AddedToken("light-switch", normalized=False), AddedToken("    ", normalized=False)])
    roles = dict(bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    if name in ("llama-bpe", "tekken"):
        bos = ("<|endoftext|>", fast.token_to_id("<|endoftext|>"))
        single = f"{bos[0]} $A <|im_end|>" if name == "tekken" else f"{bos[0]} $A"
        eos = ("<|im_end|>", fast.token_to_id("<|im_end|>"))
        fast.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=single, special_tokens=[bos, eos])])
    elif name != "gpt-2":
        fast.post_processor = processors.ByteLevel(trim_offsets=False)
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"), pretty=False)
    config = dict(clean_up_tokenization_spaces=clean, tokenizer_class="PreTrainedTokenizerFast", **roles)
    size = fast.get_vocab_size() + (5 if name in ("qwen2", "dbrx") else 0)
    if name == "llama-bpe":
        # transformers takes the files, llama.cpp's converter takes the configuration.
        config["chat_template"] = CHATML
        write(folder / "chat_template.jinja", CHATML)
        write(folder / "additional_chat_templates" / "tool-use.jinja", TOOLS)
        ends = [fast.token_to_id(text) for text in ["<|im_end|>", "<|endoftext|>", "<end_of_tool>"]]
        write(folder / "generation_config.json", {"eos_token_id": ends})
    elif name == "dbrx":
        config["chat_template"] = [{"name": "default", "template": CHATML}, {"name": "rag", "template": TOOLS}]
    elif name != "gpt-2":
        write(folder / "chat_template.jinja", CHATML)
    write(folder / "tokenizer_config.json", config)
    arch = "Qwen2ForCausalLM" if name == "qwen2" else "LlamaForCausalLM"
    write(folder / "config.json", model_config(arch, size))


def sentencepiece_model(gemma):
    model = io.BytesIO()
    user = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<b>"] if gemma else []
    ids = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3) if gemma else dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    pieces = dict(bos_piece="<bos>", eos_piece="<eos>") if gemma else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=480, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=not gemma,
        split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=user, num_threads=1,
        minloglevel=2, **ids, **pieces)
    return model.getvalue()


def spm(name, gemma=False):
    folder = FIXTURES / name
    folder.mkdir(parents=True)
    model = sentencepiece_model(gemma)
    (folder / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    extracted = SentencePieceExtractor(str(folder / "tokenizer.model")).extract(None)
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    fast = Tokenizer(models.BPE(vocab, extracted["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        fast.normalizer = replace
        fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        if name == "spm-first":
            fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        else:
            fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        parts.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(parts)
    bos = "<bos>" if gemma else "<s>"
    eos = "<eos>" if gemma else "</s>"
    specials = ["<unk>", bos, eos] + (["<pad>", "<start_of_turn>", "<end_of_turn>"] if gemma else [])
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if gemma:
        fast.add_tokens([AddedToken(text, normalized=False) for text in ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<b>"]])
    else:
        fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|odd|>", normalized=False)])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, fast.token_to_id(bos))])
    size = fast.get_vocab_size() + (0 if gemma else 3)
    if gemma:
        fast.add_special_tokens([AddedToken("<image_soft_token>", special=True, normalized=False)])
    fast.save(str(folder / "tokenizer.json"), pretty=False)
    config = dict(add_bos_token=True, add_eos_token=False, bos_token=bos, eos_token=eos, unk_token="<unk>",
                  pad_token="<pad>" if gemma else eos, clean_up_tokenization_spaces=False,
                  tokenizer_class="GemmaTokenizer" if gemma else "LlamaTokenizer")
    # transformers 4 wrote this list, and most published models have it.
    config["added_tokens_decoder"] = {
        str(i): {"content": token.content, "lstrip": False, "normalized": False, "rstrip": False,
                 "single_word": False, "special": token.special}
        for i, token in sorted(fast.get_added_tokens_decoder().items())}
    if gemma:
        write(folder / "chat_template.jinja", TOOLS.replace("[", "<start_of_turn>").replace("]", ""))
        write(folder / "generation_config.json", {"eos_token_id": [1, fast.token_to_id("<end_of_turn>")]})
    write(folder / "tokenizer_config.json", config)
    arch = "Gemma3ForCausalLM" if gemma else "LlamaForCausalLM"
    write(folder / "config.json", model_config(arch, size, unk_token_id=3 if gemma else 0))
    if name == "spm-model":
        (folder / "tokenizer.json").unlink()
    if name in ("spm-json", "spm-first"):
        (folder / "tokenizer.model").unlink()


def expected(llama_cpp, folder):
    """The tokenizer.* keys of convert_hf_to_gguf.py, which gets the pre-tokenizer's name from us: a fixture's
    vocabulary has no hash there."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: folder.name
    script = importlib.import_module("convert_hf_to_gguf")
    from gguf import GGUFReader, GGUFValueType

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        shutil.copytree(folder, copy)
        path = Path(scratch) / "vocab.gguf"
        sys.argv = ["convert", str(copy), "--outfile", str(path), "--vocab-only"]
        script.main()
        keys = {}
        for key, field in GGUFReader(path).fields.items():
            if key.startswith("tokenizer."):
                value = field.contents()
                kind = "/".join(GGUFValueType(t).name for t in field.types)
                keys[key] = {"type": kind, "value": value.decode() if isinstance(value, bytes) else value}
    write(folder / "expected.json", keys)


def main():
    llama_cpp = Path(sys.argv[1]).resolve()
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for name in BYTE_LEVEL:
        byte_level(name)
    for name in ["spm", "spm-model", "spm-json", "spm-first"]:
        spm(name)
    spm("gemma", gemma=True)
    for folder in sorted(FIXTURES.iterdir()):
        expected(llama_cpp, folder)


if __name__ == "__main__":
    main()
