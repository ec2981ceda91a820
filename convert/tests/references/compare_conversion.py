"""Our GGUF files of a checkpoint against those of llama.cpp's convert_hf_to_gguf.py: every tensor, every key.

    python compare_conversion.py LLAMA_CPP_DIR HF_DIR --pipit-convert PATH [--outtypes f32,f16,bf16,q8_0]

Prints seconds and peak memory of both. Needs what convert_hf_to_gguf.py needs (torch, transformers, numpy; gguf-py
is taken from the tree). Fails when a tensor differs, or a key that both write.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measured(command, **options):
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    message = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[:2]} failed: {message[-2000:]}")
    return f"{time.monotonic() - started:.1f} s, {usage.ru_maxrss / 1024:.0f} MiB"


def compare(kind, cost, ours, theirs):
    from gguf import GGUFReader

    a, b = GGUFReader(ours), GGUFReader(theirs)
    mine = {t.name: t for t in a.tensors}
    names = {t.name for t in b.tensors}
    bad = names ^ mine.keys()
    for tensor in b.tensors:
        other = mine.get(tensor.name)
        if other is not None and (
            other.tensor_type != tensor.tensor_type or list(other.shape) != list(tensor.shape)
            or other.data.tobytes() != tensor.data.tobytes()
        ):
            bad.add(tensor.name)
    keys_a, keys_b = ({k for k in f.fields if not k.startswith("GGUF.")} for f in (a, b))
    common = keys_a & keys_b
    differ = {k for k in common if a.fields[k].contents() != b.fields[k].contents()}
    print(f"{kind}: {len(names) - len(bad)} of {len(names)} tensors the same; "
          f"{len(common) - len(differ)} of {len(common)} common keys the same; {cost}")
    print(f"  only ours: {', '.join(sorted(keys_a - keys_b)) or '(none)'}; "
          f"only theirs: {', '.join(sorted(keys_b - keys_a)) or '(none)'}")
    for name in sorted(bad | differ):
        print(f"  differs: {name}")
    return bool(bad or differ)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--pipit-convert", required=True)
    parser.add_argument("--outtypes", default="f32,f16,bf16,q8_0")
    args = parser.parse_args()
    kinds = args.outtypes.split(",")
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        costs = []
        # All conversions first: the peak memory of a child counts from the memory of the process that starts it.
        for kind in kinds:
            ours = [args.pipit_convert, "model", args.folder, "-t", kind, "-o", f"{scratch}/ours-{kind}.gguf"]
            theirs = [sys.executable, str(args.llama_cpp / "convert_hf_to_gguf.py"), args.folder,
                      "--outfile", f"{scratch}/theirs-{kind}.gguf", "--outtype", kind]
            costs.append(f"ours {measured(ours)}, theirs {measured(theirs)}")
        sys.path.insert(0, str(args.llama_cpp / "gguf-py"))
        for kind, cost in zip(kinds, costs, strict=True):
            failed |= compare(kind, cost, f"{scratch}/ours-{kind}.gguf", f"{scratch}/theirs-{kind}.gguf")
    sys.exit(failed)


if __name__ == "__main__":
    main()
