"""Makes convert/tests/fixtures/quantized: the checkpoint of fixtures/tied in eight bits, and what llama.cpp reads.

    python make_quantized.py LLAMA_CPP_DIR

LLAMA_CPP_DIR is a source tree of llama.cpp with convert_hf_to_gguf.py. Needs torch, transformers, safetensors and gguf.

    fp8-block/    E4M3 with weight_scale_inv for blocks of 24 rows and 20 columns, which divide no matrix
    fp8-tensor/   E5M2 with one weight_scale_inv for each matrix, and scales of activations that nobody reads
    channel/      compressed-tensors, float-quantized: E4M3 with a bf16 weight_scale for every row
    int8/         compressed-tensors, int-quantized: integers with a weight_scale for every row
    */expected.json   convert_hf_to_gguf.py in F32: of every tensor its type, shape and sha256
The tokenizer is that of fixtures/tied; the folders hold the rest.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from convert_hf import convert
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def group(**weights):
    return {"quant_method": "compressed-tensors", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True, "group_size": None, **weights}}}}


def blocks(weight, height, width):
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, (height, width)))
    scale = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = weight[row * height:(row + 1) * height, column * width:(column + 1) * width]
            scale[row, column] = block.abs().max() / 448
    whole = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[:weight.shape[0], :weight.shape[1]]
    return (weight / whole).to(E4M3), scale


def fp8_block(weight):
    eight, scale = blocks(weight, 24, 20)
    return {"": eight, "_scale_inv": scale}


def fp8_tensor(weight):
    scale = weight.abs().max() / 57344
    return {"": (weight / scale).to(E5M2), "_scale_inv": scale, ".activation_scale": torch.tensor(0.5)}


def channel(weight):
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    return {"": (weight / scale.float()).to(E4M3), "_scale": scale}


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"": (weight / scale).round().to(torch.int8), "_scale": scale}


VARIANTS = {
    "fp8-block": (fp8_block, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 20]}),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "channel": (channel, group(type="float", strategy="channel") | {"format": "float-quantized"}),
    "int8": (int8, group(type="int", strategy="channel") | {"format": "int-quantized"}),
}


def main():
    llama_cpp = Path(sys.argv[1])
    tensors = load_file(FIXTURES / "tied" / "model.safetensors")
    config = json.loads((FIXTURES / "tied" / "config.json").read_text())
    shutil.rmtree(FIXTURES / "quantized", ignore_errors=True)
    for name, (quantize, says) in VARIANTS.items():
        out = {}
        for key, value in tensors.items():
            if "_proj" in key:
                parts = quantize(value)
                out[key] = parts.pop("")
                out |= {(key.removesuffix(".weight") if end.startswith(".") else key) + end: part.contiguous()
                        for end, part in parts.items()}
            else:
                out[key] = value.to(torch.bfloat16)
        folder = FIXTURES / "quantized" / name
        folder.mkdir(parents=True)
        save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": says}, indent=2) + "\n")
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / name
            shutil.copytree(FIXTURES / "tied", whole)
            shutil.copytree(folder, whole, dirs_exist_ok=True)
            _, read = convert(llama_cpp, whole, "f32", "smollm")
        (folder / "expected.json").write_text(json.dumps(read, indent=1) + "\n")


main()
