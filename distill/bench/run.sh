#!/bin/sh
# LoRA training on the CPU, pipit-distill and torch + PEFT one after the other: README.md beside this.
# usage: run.sh MODEL_DIR [PYTHON]     (PYTHON has torch, transformers and peft)
set -eu
model=$1
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo build --release --quiet --manifest-path "$here/../Cargo.toml"
program=${CARGO_TARGET_DIR:-$here/../../target}/release/pipit-distill

# 64 rows of more than 128 tokens, always the same.
"$python" - "$work/rows.jsonl" <<'PYTHON'
import json, random, sys
random.seed(1)
words = "the lamp in kitchen turn on off set heating to bedroom garage door open close what is temperature of".split()
with open(sys.argv[1], "w", encoding="utf-8") as out:
    for _ in range(64):
        out.write(json.dumps({"text": " ".join(random.choice(words) for _ in range(200))}) + "\n")
PYTHON

"$python" - "$program" "$model" "$work" <<'PYTHON'
import json, resource, subprocess, sys
program, model, work = sys.argv[1:]
subprocess.run([program, "sft", "--model", model, "--data", f"{work}/rows.jsonl", "--method", "lora", "--r", "16",
                "--lora-alpha", "32", "--learning-rate", "1e-3", "--lr-scheduler-type", "constant",
                "--per-device-train-batch-size", "4", "--max-length", "128", "--max-steps", "11",
                "--logging-steps", "1", "--quiet", "-o", f"{work}/run"], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
lines = [json.loads(line) for line in open(f"{work}/run/metrics.jsonl")]
first, last = lines[0], lines[-1]
speed = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
print(f"pipit-distill  {speed:7.1f} tokens/s   {peak:7.0f} MiB   loss {last['loss']:.3f}")
PYTHON
"$python" "$here/peft_lora.py" "$model" "$work/rows.jsonl" 10 2>/dev/null
