"""`pipit-convert model -t TYPE` beside llama-quantize, for every type, tensor by tensor.

    python compare_quantize.py --bin FOLDER --llama-quantize PATH [--types TYPE...] MODEL...

FOLDER holds pipit-convert; MODEL is a checkpoint folder, or a GGUF file that is not quantised (of a quantised one both
programs copy the blocks that have the type already, and llama-quantize does not see them here). llama-quantize must be built without
contraction (CFLAGS=CXXFLAGS=-ffp-contract=off) from a llama.cpp whose ggml-quants.c is that of the linked one. Both
start from the same weights: llama-quantize gets the model in F32. Every type is made without an importance matrix and,
if this pipit-convert has --imatrix, with a made-up one; what llama-quantize refuses must be refused here too. Compares
the type and the bytes of every tensor, general.file_type, general.quantization_version and quantize.imatrix.*. Prints
`n of n` per type and exits 1 if anything differs. Needs gguf; for Q2_0 that of llama.cpp's tree (PYTHONPATH).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

TYPES = """F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S
IQ3_M IQ3_S IQ3_XS IQ3_XXS Q2_K Q2_K_S IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S TQ2_0 TQ1_0 Q2_0 Q1_0 MXFP4_MOE""".split()
SAME = ("general.file_type", "general.quantization_version", "quantize.imatrix.")


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def write_imatrix(model, path):
    """A GGUF imatrix as llama-imatrix writes it: mean squares that differ widely between the columns."""
    random = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, arch="", endianess=gguf.GGUFEndian.LITTLE)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made-up.txt"])
    writer.add_uint32("imatrix.chunk_count", 9)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in model.tensors:
        if len(tensor.shape) == 2 and tensor.name != "token_embd.weight":
            sums = np.exp(random.uniform(-3, 3, int(tensor.shape[0]))).astype(np.float32) * 9
            writer.add_tensor(f"{tensor.name}.in_sum2", sums.reshape(1, -1))
            writer.add_tensor(f"{tensor.name}.counts", np.full((1, 1), 9 * 512, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keys(reader):
    """What both must say; of paths the last part, which is all that ours has."""
    own = {name: field.contents() for name, field in reader.fields.items() if name.startswith(SAME)}
    return {name: value.split("/")[-1] if isinstance(value, str) else value for name, value in own.items()}


def compare(ours, theirs):
    """The number of tensors that are the same, and of all."""
    ours, theirs = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    if keys(ours) != keys(theirs):
        print(f"  keys differ: {keys(ours)} and {keys(theirs)}")
        return 0, len(theirs.tensors)
    own = {tensor.name: tensor for tensor in ours.tensors}
    same = 0
    for tensor in theirs.tensors:
        other = own.pop(tensor.name, None)
        if (other is not None and other.tensor_type == tensor.tensor_type
                and other.data.tobytes() == tensor.data.tobytes()):
            same += 1
        else:
            print(f"  {tensor.name} differs: {other and other.tensor_type.name} and {tensor.tensor_type.name}")
    return same, len(theirs.tensors) + len(own)


def check(model, arguments, types, scratch):
    pipit = arguments.bin / "pipit-convert"
    f32, imatrix = scratch / "f32.gguf", scratch / "imatrix.gguf"
    made = run(pipit, "model", model, "-t", "F32", "-o", f32, "--force")
    if made.returncode:
        sys.exit(made.stderr)
    write_imatrix(gguf.GGUFReader(f32), imatrix)
    has_imatrix = "--imatrix" in run(pipit, "model", "--help").stdout
    failed = False
    for kind in types:
        line = [f"{kind:10}"]
        for options in [[], ["--imatrix", imatrix]] if has_imatrix else [[]]:
            ours, theirs = scratch / "ours.gguf", scratch / "theirs.gguf"
            mine = run(pipit, "model", model, "-t", kind, "-o", ours, "--force", *options)
            other = run(arguments.llama_quantize, *options, f32, theirs, kind)
            if mine.returncode or other.returncode:
                same = mine.returncode and other.returncode
                line.append(f"refused by {'both' if same else 'one' + mine.stderr + other.stderr[-500:]}")
            else:
                equal, total = compare(ours, theirs)
                same = equal == total
                line.append(f"{equal} of {total} tensors")
            failed |= not same
        print("  " + "   ".join(f"{part:22}" for part in line), flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("models", type=Path, nargs="+")
    arguments = parser.parse_args()
    failed = False
    for model in arguments.models:
        print(f"{model.name}: without an imatrix, with one", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            failed |= check(model, arguments, arguments.types, Path(scratch))
    sys.exit(failed)


if __name__ == "__main__":
    main()
