"""The command line of the benchmark."""

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from . import plot, report
from .measures import Bench
from .peers import Broker, Setup, versions

ROOT = Path(__file__).resolve().parents[3]
CACHE = Path(os.environ.get("PIPIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipit")
PARTS = ("one_client", "crowd", "prefix", "schema", "footprint", "growth", "ollama")
EXAMPLES = """examples:
  cargo build --release -p pipit --locked
  scripts/fetch-llama-cpp                                builds llama-server and llama-bench with the same options
  runtime/bench/run -o result.json                       15 minutes; nothing else may run on the machine
  runtime/bench/run -o quick.json --quick --only crowd   to see whether it works
  runtime/bench/run --docs result.json gemma.json        writes table and plot of docs/reference/benchmark.md
"""


@dataclass
class Counts:
    """How much is measured."""

    decode: int = 7
    decode_tokens: int = 128
    first: int = 7
    prompt_lengths: tuple = (32, 256, 1024)
    crowd: int = 8
    crowd_rounds: int = 3
    crowd_requests: int = 2
    crowd_tokens: int = 96
    prefix: int = 2
    questions: int = 20
    short_tokens: int = 24
    system_tokens: int = 800
    restarts: int = 3
    schemas: int = 16
    starts: int = 5
    growth: int = 2
    growth_contexts_rounds: int = 1
    growth_tokens: int = 64
    growth_clients: tuple = (1, 2, 4, 8, 16)
    growth_contexts: tuple = (1024, 2048, 4096, 8192)


QUICK = replace(Counts(), decode=2, decode_tokens=24, first=2, prompt_lengths=(32, 128), crowd_rounds=1, crowd_requests=1,
                crowd_tokens=16, prefix=1, questions=6, short_tokens=8, system_tokens=200, restarts=1, schemas=8, starts=1,
                growth=1, growth_tokens=12, growth_clients=(1, 2), growth_contexts=(512, 1024))


def machine():
    """The CPU and how many there are."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} CPUs"
    tree = Path("/proc/device-tree/model")
    name = tree.read_text().rstrip("\0") if tree.exists() else os.uname().machine
    return f"{name}, {os.cpu_count()} CPUs"


def measure(arguments):
    started = time.monotonic()
    folder = arguments.scratch
    folder.mkdir(parents=True, exist_ok=True)
    for path in (arguments.model, arguments.pipit, arguments.llama_bin / "llama-server", arguments.llama_bin / "llama-bench"):
        if not path.is_file():
            raise SystemExit(f"error: {path} is not there\n  hint: runtime/bench/run --help says how to build it")
    results = {}
    with tempfile.TemporaryDirectory(prefix="pipit-bench-", dir=folder) as scratch:
        setup = Setup(arguments.model.resolve(), arguments.threads, arguments.cache_type, arguments.pipit.resolve(),
                      arguments.llama_bin.resolve(), Path(scratch))
        results["about"] = {
            "date": datetime.date.today().isoformat(), "machine": machine(), "model": arguments.model.name,
            "threads": arguments.threads, "cache_type": arguments.cache_type, "context": arguments.context,
            "load_before": os.getloadavg()[0], "versions": versions(setup)}
        with Broker(setup.scratch) as broker:
            def say(text):
                print(f"{time.monotonic() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

            bench = Bench(setup, broker, QUICK if arguments.quick else Counts(), arguments.context, say)
            for part in arguments.only:
                say(part.replace("_", " "))
                try:
                    results[part] = getattr(bench, part)()
                except Exception as error:
                    # What was measured so far is worth keeping, and the run counts as failed.
                    results.setdefault("failed", {})[part] = repr(error)
                    print(f"error: {part}: {error!r}", file=sys.stderr)
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.small:
        results["program"] = {"bytes": arguments.small.stat().st_size}
    results["about"]["seconds"] = round(time.monotonic() - started)
    return results


def docs(files):
    runs = [json.loads(path.read_text()) for path in files]
    report.write(ROOT / "docs/reference/benchmark.md", report.markdown(runs))
    for results in runs[:1]:
        if "growth" in results:
            figure = ROOT / "docs/figures/runtime-growth.svg"
            figure.parent.mkdir(exist_ok=True)
            figure.write_text(plot.svg(results), encoding="utf-8")


def main():
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    parser = argparse.ArgumentParser(prog="runtime/bench/run", description="pipit beside llama-server and llama-bench: "
                                     "speed, memory, size. runtime/bench/README.md says what each figure means.",
                                     epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the results go, as JSON")
    parser.add_argument("--docs", type=Path, nargs="+", metavar="FILE",
                        help="measure nothing: write docs/reference/benchmark.md and its plot from these results")
    parser.add_argument("--model", type=Path, default=CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for every program [%(default)s]")
    parser.add_argument("--cache-type", default="f16", help="of keys and values [%(default)s]")
    parser.add_argument("--context", type=int, default=8192, help="tokens, all slots together [%(default)s]")
    parser.add_argument("--pipit", type=Path, default=target / "release/pipit", metavar="PROGRAM")
    parser.add_argument("--small", type=Path, metavar="PROGRAM",
                        help="pipit built with --no-default-features, for the line about its size")
    parser.add_argument("--llama-bin", type=Path, default=CACHE / "llama.cpp/build/bin", metavar="FOLDER",
                        help="with llama-server and llama-bench [what scripts/fetch-llama-cpp builds]")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER",
                        help="for state folders; on a real disk [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small counts: to try it out, not to publish")
    arguments = parser.parse_args()
    if arguments.docs:
        return docs(arguments.docs)
    if not arguments.output:
        parser.error("-o FILE or --docs FILE is missing")
    # So that the programs under measurement end with this one, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = measure(arguments)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(report.terminal(results))
    if "failed" in results:
        sys.exit(1)


if __name__ == "__main__":
    main()
