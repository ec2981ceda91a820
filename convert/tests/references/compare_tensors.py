"""Tensors and keys of a checkpoint's GGUF file, ours and convert_hf_to_gguf.py's, with the tokenizer left out.

    python compare_tensors.py LLAMA_CPP_DIR HF_DIR --pipit-convert PATH [--outtype bf16]

For folders whose tokenizer convert_hf_to_gguf.py does not take, as those that `import` makes of a SentencePiece model:
the script wants tokenizer.model there. Needs what convert_hf_to_gguf.py needs. Fails when a tensor differs, or a key.
"""

import argparse
import hashlib
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from convert_hf import convert


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pipit-convert", required=True)
    parser.add_argument("--outtype", default="bf16")
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    base = importlib.import_module("conversion.base")
    for module in (args.llama_cpp / "conversion").glob("*.py"):
        importlib.import_module(f"conversion.{module.stem}")
    pending = [base.TextModel]
    while pending:
        model = pending.pop()
        model.set_vocab = lambda self: None
        pending += model.__subclasses__()
    keys, tensors = convert(args.llama_cpp, args.folder, args.outtype, "")
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/ours.gguf"
        subprocess.run([args.pipit_convert, "model", str(args.folder), "-t", args.outtype, "-o", path,
                        "--no-tokenizer-proof", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        reader = GGUFReader(path)
        ours = {tensor.name: {
            "type": tensor.tensor_type.name,
            "dimensions": [int(n) for n in tensor.shape],
            "sha256": hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        } for tensor in reader.tensors}
        left_out = ("GGUF.", "tokenizer.", "pipit.")
        our_keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(left_out)}
    their_keys = {key: value["value"] for key, value in keys.items() if not key.startswith(left_out)}
    bad = [name for name in sorted(ours.keys() | tensors.keys()) if ours.get(name) != tensors.get(name)]
    bad_keys = [key for key in sorted(our_keys.keys() | their_keys.keys()) if our_keys.get(key) != their_keys.get(key)]
    print(f"{args.outtype}: {len(tensors) - len(bad)} of {len(tensors)} tensors and "
          f"{len(their_keys) - len(bad_keys)} of {len(their_keys)} keys the same")
    for name in bad:
        print(f"  {name}: ours {ours.get(name)}, theirs {tensors.get(name)}")
    for key in bad_keys:
        print(f"  {key}: ours {our_keys.get(key)}, theirs {their_keys.get(key)}")
    sys.exit(bool(bad or bad_keys))


if __name__ == "__main__":
    main()
