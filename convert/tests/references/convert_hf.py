"""convert_hf_to_gguf.py called from Python: what llama.cpp's converter makes of a checkpoint folder."""

import hashlib
import importlib
import sys
import tempfile
from pathlib import Path


def plain(value):
    return value.decode() if isinstance(value, bytes) else value


def convert(llama_cpp, folder, kind, pre):
    """Returns the keys of the GGUF file, and of every tensor its type, its dimensions in ggml's order and its sha256.

    The vocabularies of the fixtures have no hash there, so the pre-tokenizer's name is given; and they are byte-level
    BPE, also for the architectures whose own models bring SentencePiece.
    """
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    for module, name in [("gemma", "Gemma2Model"), ("phi", "Phi3MiniModel")]:
        importlib.import_module(f"conversion.{module}").__dict__[name].set_vocab = base.TextModel.set_vocab
    script = importlib.import_module("convert_hf_to_gguf")
    from gguf import GGUFReader, GGUFValueType

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{kind}.gguf"
        sys.argv = ["convert", str(folder), "--outfile", str(path), "--outtype", kind]
        script.main()
        reader = GGUFReader(path)
        keys = {}
        for key, field in reader.fields.items():
            if key.startswith("GGUF."):
                continue
            types = [GGUFValueType(t).name for t in field.types]
            keys[key] = {"type": types[-1], "array": len(types) > 1, "value": plain(field.contents())}
        tensors = {
            tensor.name: {
                "type": tensor.tensor_type.name,
                "dimensions": [int(n) for n in tensor.shape],
                "sha256": hashlib.sha256(tensor.data.tobytes()).hexdigest(),
            } for tensor in reader.tensors}
    return keys, tensors
