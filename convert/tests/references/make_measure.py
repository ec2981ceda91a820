"""Makes convert/tests/fixtures/measure: what llama-imatrix and llama-perplexity measure on fixtures/tied.

    python make_measure.py PIPIT_CONVERT LLAMA_BIN_DIR

PIPIT_CONVERT is the program, whose GGUF files are those of convert_hf_to_gguf.py (tests/golden.rs shows it).
LLAMA_BIN_DIR has llama-imatrix and llama-perplexity. Needs nothing but Python.

    text.txt        the text: words of several languages, long enough for six chunks of 64 tokens
    imatrix.gguf    llama-imatrix on the F32 file, in its own format, and
    imatrix.dat     in its older one
    figures.json    llama-perplexity on the F32 file, and --kl-divergence of the Q4_0 file from it
Both programs are given one chunk at a time (-b), as ours is, so that sums are added in the same order.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
OUT = FIXTURES / "measure"
CTX, CHUNKS = 64, 6
TEXT = """Turn on the light in the kitchen, and set it to 40 %. It is 21.5 degrees in the living room.
Zet het licht in de keuken aan. Allume la lumière dans la cuisine, s'il te plaît. Schalte das Licht ein!
The heating is off from 23:00 to 06:30; on Sundays it starts at 08:15. 日本語 עברית 한국어 👩‍🍳
What can I do for you? I have closed the blinds, and locked the front door. Nothing else is open.
Who left the garage open? The motion sensor saw somebody at 22:47, then nobody until midnight.
Set an alarm for 7 o'clock, play some music in the bathroom, and tell me what the weather will be like tomorrow.
"""


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=OUT)
    if done.returncode:
        sys.exit(f"{command[:2]} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def figures(output):
    """The figures with a name of `llama-perplexity --kl-divergence`, and their errors."""
    found = {}
    for name, value, error in re.findall(r"^([A-Z0-9 ].*?)\s*:\s+(-?[\d.]+)\s*%?(?:\s*±\s+([\d.]+))?", output[output.index("====== Perplexity"):], re.MULTILINE):
        if " I " in name:
            continue  # A line of the log.
        found[re.sub(r"\s+", " ", name).strip()] = [float(value)] + ([float(error)] if error else [])
    return found


def main():
    pipit, tools = (Path(arg).absolute() for arg in sys.argv[1:])
    OUT.mkdir(exist_ok=True)
    text = OUT / "text.txt"
    text.write_text(TEXT)
    common = ["-c", CTX, "-b", CTX, "-t", 1, "--chunks", CHUNKS]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for kind in ("F32", "Q4_0"):
            run(pipit, "model", FIXTURES / "tied", "-t", kind, "-o", scratch / kind, "--no-card")
        for kind in ("gguf", "dat"):
            run(tools / "llama-imatrix", "-m", scratch / "F32", "-f", text.name, "--no-ppl", "--output-format", kind,
                "-o", OUT / f"imatrix.{kind}", *common)
        plain = run(tools / "llama-perplexity", "-m", scratch / "F32", "-f", text.name,
                    "--save-all-logits", scratch / "logits", *common)
        perplexity = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", plain)
        output = run(tools / "llama-perplexity", "-m", scratch / "Q4_0",
                     "--kl-divergence-base", scratch / "logits", "--kl-divergence", *common)
    found = {"PPL of the reference": [float(number) for number in perplexity.groups()], **figures(output)}
    (OUT / "figures.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")


main()
