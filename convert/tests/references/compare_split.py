"""Files in parts against llama-gguf-split, in both directions.

    python compare_split.py LLAMA_GGUF_SPLIT MODEL.gguf --pipit-convert PROGRAM

MODEL.gguf is converted to Q8_0, whole and in parts of 50 MB; llama-gguf-split --merge must make the same keys and tensors
out of our parts, and our program the same tensors out of the parts of llama-gguf-split --split. Prints what it compared;
exits with 1 at a difference. Needs gguf (seen with 0.19.0).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from gguf import GGUFReader

# What only the parts have, and what says how each file was made.
OWN = ("split.", "GGUF.", "pipit.arguments")


def content(path):
    reader = GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(OWN)}
    tensors = {tensor.name: (tensor.tensor_type, tuple(tensor.shape), tensor.data.tobytes()) for tensor in reader.tensors}
    return keys, tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pipit-convert", required=True)
    args = parser.parse_args()

    def run(*command):
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)

    def convert(source, out, *more):
        run(args.pipit_convert, "model", source, "-t", "Q8_0", "-o", out, "--no-card", *more)

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        convert(args.model, scratch / "whole.gguf")
        convert(args.model, scratch / "ours.gguf", "--split-max-size", "50M")
        run(args.split, "--split", "--split-max-size", "50M", scratch / "whole.gguf", scratch / "theirs")
        ours, theirs = (sorted(scratch.glob(f"{name}-*-of-*.gguf")) for name in ("ours", "theirs"))
        names = [[tensor.name for tensor in GGUFReader(path).tensors] for path in ours]
        same = [
            ("number of parts", len(ours) == len(theirs) and len(ours) > 1),
            ("tensors of each part", names == [[t.name for t in GGUFReader(path).tensors] for path in theirs]),
        ]
        run(args.split, "--merge", ours[0], scratch / "merged.gguf")
        whole = content(scratch / "whole.gguf")
        merged = content(scratch / "merged.gguf")
        same.append((f"{len(whole[0])} keys of our parts, merged by llama-gguf-split", merged[0] == whole[0]))
        same.append((f"{len(whole[1])} tensors of our parts, merged by llama-gguf-split", merged[1] == whole[1]))
        convert(theirs[-1], scratch / "read.gguf")
        same.append(("tensors of its parts, read by us", content(scratch / "read.gguf")[1] == whole[1]))
    for what, equal in same:
        print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
    sys.exit(not all(equal for _, equal in same))


main()
