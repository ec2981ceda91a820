"""Fills corpus/TARGET with the fixtures of the tests: python make_corpus.py TARGET"""

import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "fixtures"


def two(first, second):
    """Two files in one input, as src/lib.rs takes them apart."""
    return struct.pack("<H", len(first)) + first + second


def read(path):
    return path.read_bytes() if path.is_file() else b"{}"


def gguf(keys):
    """A GGUF file without tensors."""
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for key, value in keys.items():
        if isinstance(value, str):
            out += text(key) + struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            out += text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            out += text(key) + struct.pack("<II", 4, value)
    return out


def inputs(target):
    folders = sorted({path.parent for path in FIXTURES.rglob("config.json")})
    adapters = sorted({path.parent for path in FIXTURES.rglob("adapter_config.json")})
    if target == "json":
        return [path.read_bytes() for path in FIXTURES.rglob("*.json") if path.stat().st_size < 5000]
    if target == "config":
        return [read(folder / "config.json") for folder in folders]
    if target == "checkpoint":
        return [two(read(folder / "config.json"), read(folder / "model.safetensors")) for folder in folders]
    if target == "adapter":
        return [two(read(folder / "adapter_config.json"), read(folder / "adapter_model.safetensors"))
                for folder in adapters]
    if target == "tokenizer_json":
        return [two(read(folder / "tokenizer_config.json"), read(path))
                for path in FIXTURES.rglob("tokenizer.json") for folder in [path.parent]]
    if target == "tokenizer_model":
        return [two(read(path.parent / "tokenizer_config.json"), read(path))
                for path in FIXTURES.rglob("tokenizer.model")]
    if target == "imatrix":
        files = [path.read_bytes() for path in FIXTURES.rglob("*imatrix*") if path.is_file()]
        return [data for data in files if data[:4] == b"GGUF" or data[:1] < b"\x20"]
    if target == "gguf":
        files = [path.read_bytes() for path in FIXTURES.rglob("*.gguf") if path.stat().st_size < 1 << 18]
        return files + [gguf({
            "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64,
            "llama.embedding_length": 8, "llama.feed_forward_length": 16, "llama.attention.head_count": 2,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": ["a", "b", "ab"],
            "tokenizer.ggml.merges": ["a b"]})]
    sys.exit(f"no target {target}")


folder = HERE / "corpus" / sys.argv[1]
folder.mkdir(parents=True, exist_ok=True)
for at, data in enumerate(inputs(sys.argv[1])):
    (folder / f"fixture-{at}").write_bytes(data)
