#!/usr/bin/env python3
"""The memory that `pipit-distill plan` estimates beside the most that a run took, as a table in Markdown.

usage: memory.py PROGRAM MODEL_DIR      (Linux; PROGRAM is target/release/pipit-distill)

Each setting is one run of three steps on rows that fill --max-length. The run's own summary.json says what it took
(VmHWM of /proc/self/status) and what was estimated before.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

# method, sequences in a forward pass, tokens of a sequence, forward passes in a step, more flags
SETTINGS = [
    ("lora", 1, 128, 1, []),
    ("lora", 4, 128, 1, []),
    ("lora", 4, 128, 2, []),
    ("lora", 4, 512, 1, []),
    ("lora", 1, 2048, 1, []),
    ("full", 1, 128, 1, []),
    ("full", 4, 128, 1, []),
    ("full", 4, 128, 2, []),
    ("full", 2, 512, 1, []),
]
MIB = 1 << 20


def main():
    program, model = sys.argv[1:3]
    random.seed(1)
    words = "the lamp in kitchen turn on off set heating to bedroom garage door open close what is temperature of".split()
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        lines = (json.dumps({"text": " ".join(random.choice(words) for _ in range(2200))}) for _ in range(24))
        rows.write_text("\n".join(lines), encoding="utf-8")
        print("| method | sequences × tokens | forward passes a step | estimated, MiB | taken, MiB | |")
        print("|---|---|---|---|---|---|")
        for number, (method, batch, length, passes, more) in enumerate(SETTINGS):
            run = Path(work) / f"run-{number}"
            flags = [
                "--model", model, "--data", str(rows), "--method", method, "--max-length", str(length),
                "--per-device-train-batch-size", str(batch), "--gradient-accumulation-steps", str(passes),
                "--max-steps", "3", "--logging-steps", "1", "--learning-rate", "1e-5", "-o", str(run), *more,
            ]
            flags += ["--r", "16"] if method == "lora" else []
            subprocess.run([program, "sft", "--quiet", *flags], check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((run / "summary.json").read_text())
            planned, taken = summary["planned_memory_bytes"] / MIB, summary["peak_memory_bytes"] / MIB
            name = " ".join([method, *more])
            print(f"| {name} | {batch} × {length} | {passes} | {planned:.0f} | {taken:.0f} | {100 * (planned / taken - 1):+.0f} % |",
                  flush=True)


if __name__ == "__main__":
    main()
