"""An imported checkpoint against the GGUF file it was made of: transformers here, llama.cpp there.

    python compare_checkpoint.py MODEL.gguf HF_DIR --llama-cpp PATH [--tolerance 1e-3]

PATH is the program of `cargo build --release -p pipit-convert --example llama_cpp`. Checks that the folder loads
without a warning, that both give the same tokens for every text (mixed languages, emoji, runs of spaces, digits,
special tokens, random Unicode), and prints how far the logits are apart. Needs torch, transformers and numpy.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import warnings

import numpy as np

TEXTS = [
    "<|im_start|>user\nZet het licht in de keuken aan<|im_end|>\n<|im_start|>assistant\n",
    "Allume la lumière dans la cuisine, s'il te plaît.",
    "Schalte das Licht in der Küche ein! Größe: 12,5 m²",
    "Turn on the kitchen light, and don't forget the 2nd one; we'll see.",
    "👩‍👩‍👧‍👦 family 🇳🇱 flag 🎉🎉 emoji",
    "a  b   c    d\t\te\n\n\nf \n g  ",
    "3.14159265358979 1234567890 0x1F 1,000,000 ½ ² Ⅷ ٣",
    "<|im_start|>system\nYou are.<|im_end|>\n<|endoftext|><repo_name>x<file_sep><|im_start|>",
    'fn main() { println!("{:?}", vec![1, 2, 3]); } // été',
    "I'M HERE, it's; they'LL we've ÉCOLE straße ИЛИ 日本語のテキスト 한국어 עברית العربية",
    "\u00a0non\u2003breaking\u3000spaces\u200b zero\ufeff",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "", " ", "  ", "\n", "\r\n", "\t", "a", "é", "e\u0301", "\u0000x", "<|im_end|", "<|im_start|><|im_end|>",
    " <|im_end|> ", "x<|endoftext|>y", "''s'S 're", "1", "12 345", "٠١٢", "a1b2", "…", "—–-", "\u2028\u2029",
]


def random_texts(n):
    """Random Unicode from the planes that people use, and random mixes of the texts above."""
    rng = random.Random(7)
    ranges = [(32, 126), (32, 126), (160, 591), (880, 1279), (0x2000, 0x206F), (0x3040, 0x30FF),
              (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (9, 13), (48, 57)]
    for i in range(n):
        if i % 2:
            yield "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 60)))
        else:
            yield "".join(rng.choice(TEXTS)[: rng.randint(1, 20)] for _ in range(rng.randint(1, 5)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("folder")
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--tolerance", type=float, help="fail when logits differ by more")
    args = parser.parse_args()

    warnings.simplefilter("error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model, info = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        sys.exit(f"the folder does not load cleanly: {info}")
    texts = TEXTS + list(random_texts(2000))
    with tempfile.TemporaryDirectory() as scratch:
        with open(f"{scratch}/texts.json", "w", encoding="utf-8") as f:
            json.dump(texts, f)
        command = [args.llama_cpp, args.gguf, f"{scratch}/texts.json", f"{scratch}/logits.bin"]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        logits = np.fromfile(f"{scratch}/logits.bin", dtype=np.float32).reshape(-1, model.config.vocab_size)

    different = 0
    for text, ids in zip(texts, theirs, strict=True):
        ours = tokenizer.encode(text, add_special_tokens=False)
        if ours != ids:
            different += 1
            if different <= 5:
                print(f"tokens differ for {text!r}:\n  transformers {ours}\n  llama.cpp    {ids}")
    print(f"tokens: {len(texts) - different} of {len(texts)} texts the same")

    at, largest, total, agree, rows, kl = 0, 0.0, 0.0, 0, 0, 0.0
    with torch.no_grad():
        for ids in theirs[:12]:
            if at + len(ids) > len(logits):
                break
            want = torch.from_numpy(logits[at : at + len(ids)])
            at += len(ids)
            got = model(torch.tensor([ids])).logits[0]
            difference = (got - want).abs()
            largest = max(largest, difference.max().item())
            total += difference.mean(-1).sum().item()
            agree += (got.argmax(-1) == want.argmax(-1)).sum().item()
            p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
            kl += (p.exp() * (p - q)).sum().item()
            rows += len(ids)
    print(f"logits over {rows} positions: largest difference {largest:.2e}, mean {total / rows:.2e}, "
          f"top-1 agrees {agree / rows:.2%}, KL {kl / rows:.2e}")
    if different or (args.tolerance is not None and largest > args.tolerance):
        sys.exit(1)


if __name__ == "__main__":
    main()
