"""Writes fixtures/quantize: rows of weights, and the sha256 of their blocks in every type, contraction off.

    python make_quantized_rows.py GGML [--check]

GGML is llama.cpp's folder `ggml` of the version that is linked (in ~/.cargo/registry/src/*/llama-cpp-sys-2-*). Its
kernels are compiled here with `-ffp-contract=off`, and once more with `-mfma -ffp-contract=fast`, as a C compiler does
by default where the machine has fused multiply-adds. Prints which types have other bits then, and how many; with
--check, compares with what is committed instead of writing it. Needs cc, c++ and numpy.
"""

import argparse
import ctypes
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "quantize"
ROWS, COLUMNS = 32, 1024
#: ggml_type, and whether the kernel is given an importance matrix.
TYPES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22,
    "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}
NEEDS_IMPORTANCE = {"IQ2_XXS", "IQ2_XS", "IQ1_S"}


def rows():
    """Bell-shaped, one of a hundred ten times as large, as bf16 (the upper half of a float)."""
    random = np.random.default_rng(3)
    values = random.normal(0, 0.02, ROWS * COLUMNS) * np.where(random.random(ROWS * COLUMNS) < 0.01, 10, 1)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")


def importance():
    """A weight for each column, exact in every arithmetic."""
    return np.array([2.0 ** (column * 7 % 11 - 5) for column in range(COLUMNS)], np.float32)


def kernels(ggml, flags, folder):
    """ggml's kernels as a library. What they do not use of ggml stays unresolved."""
    (folder / "ggml-version.h").write_text('#define GGML_VERSION ""\n#define GGML_COMMIT ""\n')
    base = [*flags, "-O3", "-fPIC", "-D_GNU_SOURCE", f"-I{folder}", f"-I{ggml}/include", f"-I{ggml}/src"]
    objects = []
    for source in ["ggml.c", "ggml-quants.c", "ggml-threading.cpp"]:
        compiler = ["cc", "-std=c11"] if source.endswith(".c") else ["c++", "-std=c++17"]
        objects.append(folder / f"{source}.o")
        subprocess.run([*compiler, *base, "-c", ggml / "src" / source, "-o", objects[-1]], check=True)
    library = folder / "kernels.so"
    subprocess.run(["c++", "-shared", "-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,lazy", *objects, "-o", library,
                    "-lm", "-lpthread"], check=True)
    library = ctypes.CDLL(str(library), mode=1)
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, i64]
    library.ggml_row_size.restype = ctypes.c_size_t
    return library


def blocks(library, values, kind, weights):
    out = np.zeros(library.ggml_row_size(TYPES[kind], COLUMNS) * ROWS, np.uint8)
    library.ggml_quantize_chunk(TYPES[kind], values.ctypes.data, out.ctypes.data, 0, ROWS, COLUMNS,
                                weights.ctypes.data if weights is not None else None)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ggml", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stored = rows()
    values = (stored.astype(np.uint32) << 16).view(np.float32)
    golden = {}
    with tempfile.TemporaryDirectory() as off, tempfile.TemporaryDirectory() as fast:
        exact = kernels(arguments.ggml, ["-ffp-contract=off"], Path(off))
        fused = kernels(arguments.ggml, ["-mfma", "-ffp-contract=fast"], Path(fast))
        for kind in TYPES:
            for weights in [None, importance()]:
                if weights is None and kind in NEEDS_IMPORTANCE:
                    continue
                name = kind if weights is None else f"{kind} with importance"
                one, other = (blocks(library, values, kind, weights) for library in (exact, fused))
                golden[name] = hashlib.sha256(one.tobytes()).hexdigest()
                differ = int((one != other).sum())
                print(f"{name:24} {differ:6} of {one.size} bytes differ when fused")
    text = json.dumps(golden, indent=1) + "\n"
    if arguments.check:
        same = ((FIXTURES / "contraction-off.json").read_text() == text
                and (FIXTURES / "rows.bf16").read_bytes() == stored.tobytes())
        sys.exit(0 if same else "not what is committed")
    FIXTURES.mkdir(exist_ok=True)
    (FIXTURES / "rows.bf16").write_bytes(stored.tobytes())
    (FIXTURES / "contraction-off.json").write_text(text)


if __name__ == "__main__":
    main()
