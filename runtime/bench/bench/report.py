"""Results become a table, for the terminal and for the docs."""

from .bars import bars

BEGIN, END = "<!-- written by runtime/bench/run -->", "<!-- end of what runtime/bench/run has written -->"
COLUMNS = ("", "pipit", "peer", "ratio", "bar", "")


def cells(bar):
    verdict = "" if bar.met is None else "met" if bar.met else "**missed**"
    return bar.what, bar.pipit, bar.peer, bar.found, bar.bar, verdict


def terminal(results):
    """The table with columns that line up."""
    rows = [COLUMNS, *(cells(bar) for bar in bars(results))]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def markdown(runs):
    """The block of docs/reference/benchmark.md, a part for each file of results."""
    parts = []
    for results in runs:
        about = results["about"]
        parts.append(f"### {about['model']}\n\n{about['date']}, {about['machine']}, {about['threads']} threads, KV cache "
                     f"{about['cache_type']}, context {about['context']}; {about['versions']['pipit']}, llama-server "
                     f"{about['versions']['llama-server']}; Ollama: {about['versions']['ollama']}.")
        parts.append(table(COLUMNS, [cells(bar) for bar in bars(results)]))
        if one := results.get("one_client"):
            parts.append(path(one))
        if growth := results.get("growth"):
            parts.append(grown(growth))
        for part, why in results.get("failed", {}).items():
            parts.append(f"Not whole: `{part}`: {why}.")
    return "\n\n".join(parts)


def path(one):
    """Where the time between publish and first chunk goes."""
    rows = [[str(first["prompt_tokens"]), *(f"{first[name][key]['median']:.1f}" for name in ("pipit", "llama-server")
                                            for key in ("prompt_ms", "besides_prefill_ms"))] for first in one["first"]]
    header = ["tokens of the prompt", "pipit: prefill, ms", "pipit: all else, ms", "llama-server: prefill, ms",
              "llama-server: all else, ms"]
    refused, sync = one["path"]["refused_ms"]["median"], one["path"]["fdatasync_ms"]["median"]
    nagle = one["nagle"]["refused_ms"]["median"]
    return (f"{table(header, rows)}\n\nOf pipit's other time, {refused:.1f} ms are the way through broker and daemon and "
            f"back (measured with a request that is refused at once; {nagle:.1f} ms where mosquitto lacks "
            f"`set_tcp_nodelay true`), and {sync:.1f} ms one fdatasync of the journal.")


def grown(growth):
    clients = table(["clients", "pipit, tokens/s", "llama-server, tokens/s", "pipit, MiB", "llama-server, MiB"],
                    [[str(row["clients"]), *values(row, "tokens_per_s"), *values(row, "rss_mib")]
                     for row in growth["clients"]])
    contexts = table(["context", "pipit, prefill/s", "llama-server", "pipit, decode/s", "llama-server", "pipit, MiB",
                      "llama-server"],
                     [[str(row["context"]), *values(row, "prefill_per_s"), *values(row, "tokens_per_s"),
                       *values(row, "rss_mib")] for row in growth["contexts"]])
    return f"{clients}\n\n{contexts}"


def values(row, key):
    return [f"{row[name][key]:.1f}" for name in ("pipit", "llama-server")]


def write(page, text):
    """Puts the text between the marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"error: {page} has no lines `{BEGIN}` and `{END}`")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
