"""`imatrix` and `compare` beside llama-imatrix and llama-perplexity, on one model and one text.

    python compare_measure.py LLAMA_BIN MODEL.gguf --pipit-convert PATH [--ctx 128] [--chunks 4] [--type Q3_K_S]

LLAMA_BIN is the folder of llama.cpp's programs. The text is this project's documentation. MODEL is compared with itself
in TYPE. Prints both programs' figures; exits with 1 when a sum of squares differs by more than one in a hundred
thousand, the mean divergence by more than one in a hundred (llama-perplexity keeps the reference in 16 bits), anything
else by more than one in ten thousand. Needs gguf and numpy.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

DOCS = Path(__file__).resolve().parents[3] / "docs"


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def tensors(path):
    return {tensor.name: tensor.data.astype(np.float64) for tensor in GGUFReader(path).tensors}


def compare_imatrix(arguments, text, scratch):
    common = [arguments.chunks, "--threads", 2]
    ours, theirs = scratch / "ours.gguf", scratch / "theirs.gguf"
    run(arguments.pipit_convert, "imatrix", arguments.model, "--text", text, "-o", ours, "--ctx", arguments.ctx,
        "--chunks", *common)
    run(arguments.llama_bin / "llama-imatrix", "-m", arguments.model, "-f", text, "-o", theirs, "-c", arguments.ctx,
        "-b", arguments.ctx, "--no-ppl", "--chunks", *common)
    ours, theirs = tensors(ours), tensors(theirs)
    largest = max(np.max(np.abs(ours[name] - other) / np.maximum(np.abs(other), 1e-30))
                  for name, other in theirs.items() if name in ours)
    print(f"imatrix: {len(ours.keys() & theirs.keys())} of {len(theirs)} tensors in both, largest relative difference {largest:.1e}")
    return ours.keys() == theirs.keys() and largest < 1e-5


def compare_models(arguments, text, scratch):
    other, base = scratch / "other.gguf", scratch / "base.bin"
    run(arguments.pipit_convert, "model", arguments.model, "-t", arguments.type, "-o", other, "--no-card")
    ours = json.loads(run(arguments.pipit_convert, "compare", arguments.model, other, "--text", text, "--ctx",
                          arguments.ctx, "--chunks", arguments.chunks, "--threads", 2, "--json", "--quiet"))
    perplexity = [arguments.llama_bin / "llama-perplexity", "-f", text, "-c", arguments.ctx, "-b", arguments.ctx,
                  "--chunks", arguments.chunks, "-t", 2]
    plain = run(*perplexity, "-m", arguments.model, "--kl-divergence-base", base)
    theirs = run(*perplexity, "-m", other, "--kl-divergence-base", base, "--kl-divergence")
    number = r"([-\d.]+)"
    ours = ours["comparison"]
    rows = [
        ("perplexity of the reference", ours["reference_perplexity"]["value"], rf"Final estimate: PPL = {number}", plain, 1e-4),
        ("perplexity of the other", ours["perplexity"]["value"], rf"Mean PPL\(Q\)\s*:\s*{number}", theirs, 1e-4),
        ("mean divergence", ours["divergence"]["mean"]["value"], rf"Mean\s+KLD:\s*{number}", theirs, 1e-2),
        ("same first guess, %", 100 * ours["same_top"]["value"], rf"Same top p:\s*{number}", theirs, 1e-4),
    ]
    same = True
    for name, own, pattern, output, tolerance in rows:
        value = float(re.search(pattern, output)[1])
        print(f"compare: {name} {own:.6f}, llama-perplexity {value}")
        same &= abs(own - value) <= tolerance * abs(value)
    return same


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_bin", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pipit-convert", required=True)
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--type", default="Q3_K_S")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = scratch / "text.txt"
        text.write_text("\n".join(page.read_text() for page in sorted(DOCS.glob("*.md"))))
        same = [compare_imatrix(arguments, text, scratch), compare_models(arguments, text, scratch)]
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
