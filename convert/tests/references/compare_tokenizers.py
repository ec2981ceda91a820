"""Tokenizers of GGUF files, imported: transformers here, llama.cpp there; and back, proved.

    python compare_tokenizers.py EXAMPLE MODEL.gguf...

EXAMPLE is the program of `cargo build -p pipit-convert --example tokenizer`. Every file's tokenizer is written as a
folder; transformers must load it as a fast tokenizer and give the identifiers that llama.cpp gives for the file, for
every text; and the folder must be proved again. llama.cpp's source tree has vocabularies to try in models/. Needs
transformers (seen with 5.23.0).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from compare_checkpoint import TEXTS, random_texts
from transformers import AutoTokenizer


def compare(example, gguf, scratch):
    folder = scratch / gguf.stem
    subprocess.run([example, gguf, folder], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        sys.exit(f"{gguf}: transformers does not load a fast tokenizer")
    added = [token.content for token in tokenizer.added_tokens_decoder.values()][:300]
    texts = TEXTS + list(random_texts(2000)) + added + [f"x{token}y {token} z" for token in added]
    (scratch / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    run = subprocess.run([example, gguf, scratch / "texts.json"], check=True, capture_output=True, text=True)
    same, shown = 0, 0
    for text, theirs in zip(texts, json.loads(run.stdout), strict=True):
        ours = tokenizer.encode(text, add_special_tokens=False)
        same += ours == theirs
        if ours != theirs and shown < 3:
            shown += 1
            print(f"  {text!r}\n    transformers {ours}\n    llama.cpp    {theirs}")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    run = subprocess.run([example, folder, scratch / "back.gguf"], check=True, capture_output=True, text=True)
    print(f"{gguf.name}: {same} of {len(texts)} texts the same; back: {run.stdout.strip()}")
    return same == len(texts) and "not proved" not in run.stdout


def main():
    example, *files = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        passed = [compare(Path(example).resolve(), Path(file), Path(scratch)) for file in files]
    if not all(passed) or not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
