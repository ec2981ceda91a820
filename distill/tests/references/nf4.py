#!/usr/bin/env python3
"""NF4 as bitsandbytes makes it on the CPU, plain and with double quantisation.

    python nf4.py ../fixtures

Writes
nf4.safetensors   for each case: input, packed codes, plain absmax, absmax codes, nested absmax, offset, and the
                  dequantised matrix of both; and the dynamic map
torch_means.json  torch's mean of numbers that a hash makes, for many lengths, as bits
Seen with torch 2.15 and bitsandbytes 0.50.2, one thread, x86-64 with AVX2.
"""
import json
import pathlib
import struct
import sys

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file

OUT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
torch.set_num_threads(1)
CODES = bnb.get_4bit_type("nf4", device="cpu")


def cases():
    torch.manual_seed(7)
    borders = (CODES[:-1] + CODES[1:]) / 2
    # Every code, every border and its neighbours, in one block whose scale is 1.
    exact = torch.cat([CODES, borders, torch.nextafter(borders, torch.tensor(2.0)), torch.zeros(18)])
    yield "codes_and_borders", exact.reshape(1, 64)
    yield "rows_inside_blocks", torch.randn(40, 100) * 0.05
    yield "odd", torch.randn(33, 7)
    yield "one", torch.tensor([[-0.3]])
    yield "three", torch.tensor([[0.1, -0.3, 0.2]])
    zero = torch.randn(8, 64)
    zero[3] = 0
    yield "a_zero_block", zero
    yield "all_zero", torch.zeros(5, 30)
    yield "tiny", torch.randn(4, 40) * 1e-39
    # Rows of very different size, and more than one block of scales, the last one short.
    yield "nested", torch.randn(300, 64) * torch.logspace(-4, 1, 300)[:, None]


def means():
    lengths = list(range(1, 40)) + [100, 255, 256, 1000, 2049, 20000, 100003, 442368]
    for length in lengths:
        numbers = torch.arange(length, dtype=torch.int64) * 2654435761 % 2**32 // 256
        mean = (numbers.float() / 2**24).mean().item()
        yield length, struct.unpack("<I", struct.pack("<f", mean))[0]


def main():
    out = {"dynamic_map": bnb.create_dynamic_map()}
    for name, matrix in cases():
        packed, plain = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
        again, double = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(packed, again) and double.state2.blocksize == 256
        out[f"{name}.input"] = matrix
        out[f"{name}.packed"] = packed.reshape(-1)
        out[f"{name}.absmax"] = plain.absmax
        out[f"{name}.dequantized"] = bnb.dequantize_4bit(packed, plain)
        out[f"{name}.double.absmax"] = double.absmax
        out[f"{name}.double.nested_absmax"] = double.state2.absmax
        out[f"{name}.double.offset"] = double.offset.reshape(1)
        out[f"{name}.double.dequantized"] = bnb.dequantize_4bit(packed, double)
    save_file({key: value.contiguous() for key, value in out.items()}, OUT / "nf4.safetensors")
    (OUT / "torch_means.json").write_text(json.dumps(list(means())) + "\n")


main()
