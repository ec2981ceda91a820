"""The bars: what was promised, what was measured, whether it is met."""

from dataclasses import dataclass

#: Bytes of the stripped program without the embedded broker, MiB of the daemon without a model.
MOST_BYTES, MOST_UNLOADED_MIB = 12 << 20, 15


@dataclass
class Bar:
    """A line of the table. `met` is None for a figure that nothing was promised about."""

    what: str
    pipit: str
    peer: str
    found: str
    bar: str
    met: bool | None = None


def at_least(what, pipit, peer, name, unit, bar):
    """pipit's figure over the peer's must be at least `bar`; without a bar it is only shown."""
    ratio = pipit / peer
    return Bar(what, f"{pipit:.1f} {unit}", f"{peer:.1f} {unit} ({name})", f"{ratio:.2f}",
               f"≥ {bar}" if bar else "", ratio >= bar if bar else None)


def at_most(what, pipit, peer, name, unit, bar):
    """pipit's figure must be at most the peer's."""
    return Bar(what, f"{pipit:.1f} {unit}", f"{peer:.1f} {unit} ({name})", f"{pipit / peer:.2f}",
               "≤ 1" if bar else "", pipit <= peer if bar else None)


def bars(results):
    """All lines that the results have figures for."""
    lines = []
    for part in (one_client, crowd, prefix, schema, footprint, program):
        if found := results.get(part.__name__):
            lines += part(found)
    return lines


def one_client(found):
    decode = found["decode"]
    bench = decode["llama-bench"]["median"]
    lines = [
        at_least("one client: decode, client's clock, first chunk to end", decode["pipit"]["client_clock"]["median"],
                 bench, "llama-bench", "tokens/s", 0.97),
        at_least("one client: decode, the answer's timings", decode["pipit"]["own_timings"]["median"], bench,
                 "llama-bench", "tokens/s", 0.97),
        at_least("one client: decode, client's clock", decode["pipit"]["client_clock"]["median"],
                 decode["llama-server"]["client_clock"]["median"], "llama-server", "tokens/s", None),
        at_least("one client: decode, client's clock, mosquitto without set_tcp_nodelay",
                 found["nagle"]["client_clock"]["median"], bench, "llama-bench", "tokens/s", None),
    ]
    for first in found["first"]:
        own, other = first["pipit"]["first_ms"]["median"], first["llama-server"]["first_ms"]["median"]
        difference = first["difference_ms"]["median"]
        lines.append(Bar(f"one client: publish to first chunk, {first['prompt_tokens']} tokens", f"{own:.1f} ms",
                         f"{other:.1f} ms (llama-server)", f"{difference:+.1f} ms", "≤ +5 ms", difference <= 5))
    return lines


def compare(found, what, key, unit, bar):
    return at_least(what, found["pipit"][key]["median"], found["llama-server"][key]["median"], "llama-server", unit, bar)


def crowd(found):
    return [compare(found, f"{found['clients']} clients at once: all tokens", "tokens_per_s", "tokens/s", 1)]


def prefix(found):
    what = f"{found['questions']} questions, system message of {found['system_tokens']} tokens"
    lines = [compare(found["at_once"], f"{what}, at once", "answers_per_s", "answers/s", 1.5),
             compare(found["one_by_one"], f"{what}, one after another", "answers_per_s", "answers/s", None)]
    names = {"answer_ms": ("publish to whole answer", 5), "first_ms": ("publish to first chunk", None),
             "start_to_answer_ms": ("start of the program to whole answer", None)}
    for key, (name, bar) in names.items():
        cold, kept = found["restart"][key]["cold"]["median"], found["restart"][key]["kept"]["median"]
        lines.append(Bar(f"first answer after a restart: {name}", f"{kept:.0f} ms", f"{cold:.0f} ms (cold start)",
                         f"{cold / kept:.1f} times sooner", f"≥ {bar}" if bar else "", cold / kept >= bar if bar else None))
    return lines


def schema(found):
    return [compare(found["one_by_one"], "JSON schema, one client", "tokens_per_s", "tokens/s", 1),
            compare(found["at_once"], "JSON schema, all clients at once", "tokens_per_s", "tokens/s", 1),
            compare(found["one_by_one"], "JSON schema, one client", "answers_per_s", "answers/s", None),
            compare(found["at_once"], "JSON schema, all clients at once", "answers_per_s", "answers/s", None)]


def footprint(found):
    own, other, unloaded = found["pipit"]["after"], found["llama-server"]["after"], found["unloaded"]
    context = found["context"]
    start = {name: value["median"] for name, value in found["start_ms"].items()}
    return [
        at_most(f"memory of daemon and worker after the same requests, context {context} (PSS)", own["pss_mib"],
                other["pss_mib"], "llama-server", "MiB", True),
        at_most("the same when ready (PSS)", found["pipit"]["ready"]["pss_mib"], found["llama-server"]["ready"]["pss_mib"],
                "llama-server", "MiB", None),
        Bar("memory of the daemon, model unloaded (resident)", f"{unloaded['rss_mib']:.1f} MiB", "", "",
            f"< {MOST_UNLOADED_MIB} MiB", unloaded["rss_mib"] < MOST_UNLOADED_MIB),
        at_most("start to ready", start["pipit"], start["llama-server"], "llama-server", "ms", True),
        at_most("start to ready, the first one ever (hashes the model)", start["pipit, first start"],
                start["llama-server"], "llama-server", "ms", None),
    ]


def program(found):
    size = found["bytes"]
    return [Bar("size of the stripped program without the embedded broker", f"{size / (1 << 20):.2f} MiB", "", "",
                f"< {MOST_BYTES >> 20} MiB", size < MOST_BYTES)]
