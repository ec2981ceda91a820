"""`pipit-convert import` of every architecture, loaded in transformers.

    python check_import.py --bin FOLDER [MODEL.gguf...]

FOLDER holds pipit-convert and examples/llama_cpp (`cargo build -p pipit-convert --bins --examples`, then
target/debug). Every checkpoint of fixtures/architectures is converted to F32, BF16 and Q8_0 and imported again. The
imported folder must load without a warning and without missing or unexpected keys; from F32 its weights must be those
of the fixture bit for bit (Gemma's norms plus one), and from all three its logits those that llama.cpp has for the same weights in F32. Every
MODEL.gguf is imported, converted to F32 and compared as compare_checkpoint.py does. Needs torch and transformers.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "architectures"
TEXT = "Turn on the kitchen light, please! Zet het licht in de keuken aan: 21 degrees."
#: llama.cpp rounds the activation of Gemma to f16.
TOLERANCE = {"gemma2": 1e-2, "gemma3": 1e-2, "gemma3-linear": 1e-2}


def run(*command):
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def load(folder):
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("error")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                                       attn_implementation="eager")
    if any(info.values()):
        sys.exit(f"{folder} does not load cleanly: {info}")
    return tokenizer, model.eval()


def check_fixture(name, tools, scratch):
    folder = scratch / name
    shutil.copytree(FIXTURES / "tokenizer", folder)
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    original = load_file(folder / "model.safetensors")
    line = []
    for kind in ["F32", "BF16", "Q8_0"]:
        gguf, f32, imported = scratch / f"{kind}.gguf", scratch / f"{kind}-f32.gguf", scratch / kind / name
        imported.parent.mkdir(exist_ok=True)
        run(tools / "pipit-convert", "model", folder, "-t", kind, "-o", gguf, "--force")
        run(tools / "pipit-convert", "import", gguf, "-o", imported)
        run(tools / "pipit-convert", "model", imported, "-t", "F32", "-o", f32, "--force")
        tokenizer, model = load(imported)
        written = load_file(imported / "model.safetensors")
        if written.keys() - {"lm_head.weight"} != original.keys() - {"lm_head.weight"}:
            sys.exit(f"{name}: other tensors than transformers wrote: {written.keys() ^ original.keys()}")
        if kind == "F32":
            for key, value in original.items():
                # Gemma's norms are stored plus one, which rounds.
                more = "gemma" in name and "norm" in key
                if not torch.equal(value.float() + more, written[key] + more):
                    sys.exit(f"{name}: {key} changed")
        (scratch / "texts.json").write_text(json.dumps([TEXT]))
        run(tools / "examples" / "llama_cpp", f32, scratch / "texts.json", scratch / "logits.bin")
        theirs = np.fromfile(scratch / "logits.bin", dtype=np.float32).reshape(-1, model.config.vocab_size)
        with torch.no_grad():
            ids = tokenizer.encode(TEXT, add_special_tokens=False)
            ours = model(torch.tensor([ids])).logits[0].numpy()
        difference = np.abs(ours - theirs).max()
        line.append(f"{kind} {difference:.1e}")
        if difference > TOLERANCE.get(name, 1e-4):
            sys.exit(f"{name}, {kind}: logits differ by {difference}")
    print(f"{name}: loads cleanly, weights equal; logits of transformers and llama.cpp differ by {', '.join(line)}")


def check_model(gguf, tools, scratch):
    folder, f32 = scratch / gguf.stem, scratch / "real-f32.gguf"
    run(tools / "pipit-convert", "import", gguf, "-o", folder)
    run(tools / "pipit-convert", "model", folder, "-t", "F32", "-o", f32, "--force")
    print(f"{gguf.name}:", flush=True)
    script = Path(__file__).with_name("compare_checkpoint.py")
    result = subprocess.run([sys.executable, script, f32, folder, "--llama-cpp", tools / "examples" / "llama_cpp"])
    shutil.rmtree(folder)
    return result.returncode


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    args = parser.parse_args()
    failed = False
    names = sorted(path.name for path in FIXTURES.iterdir() if path.name != "tokenizer")
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            check_fixture(name, args.bin, Path(scratch))
        for model in args.models:
            failed |= check_model(model, args.bin, Path(scratch)) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
