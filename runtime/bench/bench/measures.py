"""The measurements, a function for each part of the table. Peers take turns, so that drift of the machine hits all."""

import os
import statistics
import time
from pathlib import Path

from .clients import together
from .peers import Broker, LlamaServer, Ollama, Pipit, llama_bench
from .processes import program, settle
from .prompts import Prompts


def median(values):
    return round(statistics.median(values), 3)


def spread(values):
    """Median, least and most."""
    values = list(values)
    return {"median": median(values), "min": round(min(values), 3), "max": round(max(values), 3), "runs": len(values)}


def turns(peers, rounds, act):
    """`act(peer)` of every peer in every round, each round in the other order; lists of results by the peer's name."""
    results = {peer.name: [] for peer in peers}
    for at in range(rounds):
        for peer in peers if at % 2 == 0 else reversed(peers):
            settle(peer.process for peer in peers)
            results[peer.name].append(act(peer))
    return results


class Bench:
    """One run: the setup, the counts, and a place to say how far it is."""

    def __init__(self, setup, broker, counts, context, say):
        self.setup, self.broker, self.counts, self.context, self.say = setup, broker, counts, context, say

    def pipit(self, slots=8, context=None, **more):
        return Pipit(self.setup, self.broker, context or self.context, slots, **more)

    def server(self, slots=None, context=None):
        return LlamaServer(self.setup, context or self.context, slots)

    def one_client(self):
        """Decode and the first token of one client; llama-server with its defaults."""
        counts = self.counts
        result = {"decode_tokens": counts.decode_tokens, "first": []}
        with self.pipit() as pipit, self.server() as server:
            prompts = Prompts(server.tokens)
            clients = {peer.name: peer.client() for peer in (pipit, server)}
            processes = [pipit.process, server.process]

            def ask(name, body):
                settle(processes)
                return clients[name].ask(body)

            for client in clients.values():
                client.ask(prompts.story(4))
            streams, depth = {"pipit": [], "llama-server": []}, 0
            bench = []
            for at in range(counts.decode):
                body = prompts.story(counts.decode_tokens, stream=True)
                for name in sorted(clients, reverse=at % 2 == 1):
                    streams[name].append(ask(name, body))
                depth = streams["pipit"][0].prompt_tokens
                settle(processes)
                bench.append(llama_bench(self.setup, 0, counts.decode_tokens, depth))
            result["decode"] = {name: {"client_clock": spread(answer.streamed_rate for answer in answers),
                                       "own_timings": spread(answer.decode_rate for answer in answers),
                                       "tokens": [answer.tokens for answer in answers]}
                                for name, answers in streams.items()}
            result["decode"]["llama-bench"] = spread(bench)
            result["depth"] = depth
            for length in counts.prompt_lengths:
                asked = []
                for at in range(counts.first):
                    body = prompts.question(length, 2, stream=True)
                    pair = {name: ask(name, body) for name in sorted(clients, reverse=at % 2 == 1)}
                    asked.append(pair)
                result["first"].append({
                    "prompt_tokens": asked[0]["pipit"].prompt_tokens,
                    **{name: {"first_ms": spread(pair[name].first_ms for pair in asked),
                              "prompt_ms": spread(pair[name].prompt_ms for pair in asked),
                              "besides_prefill_ms": spread(pair[name].first_ms - pair[name].prompt_ms for pair in asked),
                              "cached_tokens": spread(pair[name].cached_tokens for pair in asked)}
                       for name in clients},
                    "difference_ms": spread(pair["pipit"].first_ms - pair["llama-server"].first_ms for pair in asked),
                })
                self.say(f"first token after {length} tokens: {result['first'][-1]['difference_ms']['median']:+.1f} ms")
            result["path"] = {"refused_ms": spread(clients["pipit"].refused() for _ in range(20)),
                              "fdatasync_ms": spread(fdatasync(self.setup.scratch, 20))}
            for client in clients.values():
                client.close()
        with Broker(self.setup.scratch, nodelay=False) as plain, \
                Pipit(self.setup, plain, self.context, slots=8) as pipit:
            client = pipit.client()
            client.ask(prompts.story(4))
            decoded = [client.ask(prompts.story(counts.decode_tokens, stream=True)) for _ in range(counts.decode)]
            result["nagle"] = {"client_clock": spread(answer.streamed_rate for answer in decoded),
                               "refused_ms": spread(client.refused() for _ in range(20))}
            client.close()
        return result

    def crowd(self):
        """Total tokens a second of several clients at once, each slot of the server its own client."""
        counts, clients = self.counts, self.counts.crowd
        result = {"clients": clients}
        with self.pipit(slots=clients) as pipit, self.server(slots=clients) as server:
            prompts = Prompts(server.tokens)
            peers = [pipit, server]
            connected = {peer.name: [peer.client() for _ in range(clients)] for peer in peers}
            rounds = {}

            def act(peer):
                # The same prompts for both, new ones in every round.
                bodies = rounds[peer.name].pop(0)
                return together(connected[peer.name], bodies)

            made = [[[prompts.story(counts.crowd_tokens) for _ in range(counts.crowd_requests)] for _ in range(clients)]
                    for _ in range(counts.crowd_rounds)]
            rounds = {peer.name: list(made) for peer in peers}
            for name, runs in turns(peers, counts.crowd_rounds, act).items():
                result[name] = {"tokens_per_s": spread(run.tokens_per_s for run in runs),
                                "answers_per_s": spread(run.answers_per_s for run in runs),
                                "tokens": [run.tokens for run in runs]}
            close(connected)
        return result

    def prefix(self):
        """Short questions after one long system message, new in every round; llama-server with its defaults."""
        counts = self.counts
        result = {"system_tokens": counts.system_tokens, "questions": counts.questions, "max_tokens": counts.short_tokens}
        with self.pipit() as pipit, self.server() as server:
            prompts = Prompts(server.tokens)
            peers = [pipit, server]
            connected = {peer.name: [peer.client() for _ in range(counts.questions)] for peer in peers}
            for way in ("at_once", "one_by_one"):
                families = [prompts.family(counts.system_tokens, counts.questions, counts.short_tokens)
                            for _ in range(counts.prefix)]
                rounds = {peer.name: list(families) for peer in peers}

                def act(peer, way=way, rounds=rounds):
                    bodies, clients = rounds[peer.name].pop(0), connected[peer.name]
                    if way == "at_once":
                        return together(clients, [[body] for body in bodies])
                    return together(clients[:1], [bodies])

                result[way] = {name: {"answers_per_s": spread(run.answers_per_s for run in runs),
                                      "tokens_per_s": spread(run.tokens_per_s for run in runs),
                                      "seconds": spread(run.seconds for run in runs),
                                      "cached_tokens": [sum(answer.cached_tokens for answer in run.answers) for run in runs],
                                      "prompt_tokens": [sum(answer.prompt_tokens for answer in run.answers) for run in runs]}
                               for name, runs in turns(peers, counts.prefix, act).items()}
                self.say(f"shared system message, {way}: {ratio(result[way], 'answers_per_s'):.2f} of llama-server's")
            family = prompts.family(counts.system_tokens, 3, counts.short_tokens, stream=True)
            close(connected)
        result["restart"] = self.restart(family)
        return result

    def restart(self, family):
        """The first answer of a daemon that finds the beginning of the prompt on its disk, and of one that does not."""
        cold, warm = [], []

        def first(folder):
            with self.pipit(state=folder) as pipit:
                client = pipit.client()
                answer = client.ask(family[-1])
                ended = time.perf_counter()
                client.close()
                return {"first_ms": answer.first_ms, "answer_ms": answer.total_ms,
                        "start_to_answer_ms": (ended - pipit.started) * 1000, "cached": answer.cached_tokens}

        for at in range(self.counts.restarts):
            kept = self.setup.scratch / f"kept-{at}"
            with self.pipit(state=kept) as pipit:
                client = pipit.client()
                for body in family[:2]:
                    client.ask(body)
                client.close()
            # The question that is measured has not been asked before.
            warm.append(first(kept))
            cold.append(first(self.setup.scratch / f"empty-{at}"))
        found = {}
        for name in ("first_ms", "answer_ms", "start_to_answer_ms", "cached"):
            found[name] = {"cold": spread(run[name] for run in cold), "kept": spread(run[name] for run in warm)}
        return found

    def schema(self):
        """Answers that obey a JSON schema: one client after another, then all at once."""
        counts, clients = self.counts, self.counts.crowd
        result = {"requests": counts.schemas}
        with self.pipit(slots=clients) as pipit, self.server(slots=clients) as server:
            prompts = Prompts(server.tokens)
            peers = [pipit, server]
            connected = {peer.name: [peer.client() for _ in range(clients)] for peer in peers}
            for name in connected:
                connected[name][0].ask(prompts.command(96))
            for way in ("one_by_one", "at_once"):
                bodies = [[prompts.command(96) for _ in range(counts.schemas)] for _ in range(counts.crowd_rounds)]
                rounds = {peer.name: list(bodies) for peer in peers}

                def act(peer, way=way, rounds=rounds):
                    own = rounds[peer.name].pop(0)
                    group = connected[peer.name] if way == "at_once" else connected[peer.name][:1]
                    return together(group, [own[at::len(group)] for at in range(len(group))])

                result[way] = {name: {"tokens_per_s": spread(run.tokens_per_s for run in runs),
                                      "answers_per_s": spread(run.answers_per_s for run in runs),
                                      "tokens": [run.tokens for run in runs],
                                      "cut": sum(answer.finish != "stop" for run in runs for answer in run.answers),
                                      "example": runs[0].answers[0].text}
                               for name, runs in turns(peers, counts.crowd_rounds, act).items()}
                self.say(f"JSON answers, {way}: {ratio(result[way], 'tokens_per_s'):.2f} of llama-server's tokens/s")
            close(connected)
        return result

    def footprint(self):
        """Memory after the same requests, with only one of them on the machine; start; size of the program."""
        counts, slots = self.counts, self.counts.crowd
        result = {"context": self.context, "slots": slots}
        bodies = None
        for make in (lambda: self.server(slots=slots), lambda: self.pipit(slots=slots)):
            with make() as peer:
                if bodies is None:
                    prompts = Prompts(peer.tokens)
                    bodies = [[prompts.story(counts.crowd_tokens), prompts.question(300, 16, stream=False)]
                              for _ in range(slots)]
                before = peer.memory()
                clients = [peer.client() for _ in range(slots)]
                together(clients, bodies)
                result[peer.name] = {"ready": before, "after": peer.memory()}
                for client in clients:
                    client.close()
        with self.pipit(idle_unload_s=1) as pipit:
            client = pipit.client()
            client.ask(bodies[0][1])
            result["unloaded"] = pipit.memory_unloaded()
            client.close()
        kept = self.setup.scratch / "kept-start"
        starts = {"llama-server": [], "pipit": [], "pipit, first start": []}
        for at in range(counts.starts):
            with self.server(slots=slots) as server:
                starts["llama-server"].append(server.ready_s * 1000)
            with self.pipit(slots=slots) as pipit:
                starts["pipit, first start"].append(pipit.ready_s * 1000)
            with self.pipit(slots=slots, state=kept) as pipit:
                # The very first one has no hash of the model yet.
                if at > 0 or counts.starts == 1:
                    starts["pipit"].append(pipit.ready_s * 1000)
        result["start_ms"] = {name: spread(values) for name, values in starts.items()}
        return result

    def growth(self):
        """Tokens a second and memory as clients and context grow."""
        counts = self.counts
        result = {"clients": [], "contexts": []}
        most = max(counts.growth_clients)
        with self.pipit(slots=most) as pipit, self.server(slots=most) as server:
            prompts = Prompts(server.tokens)
            peers = [pipit, server]
            connected = {peer.name: [peer.client() for _ in range(most)] for peer in peers}
            for clients in counts.growth_clients:
                made = [[[prompts.story(counts.growth_tokens)] for _ in range(clients)] for _ in range(counts.growth)]
                rounds = {peer.name: list(made) for peer in peers}

                def act(peer, clients=clients, rounds=rounds):
                    run = together(connected[peer.name][:clients], rounds[peer.name].pop(0))
                    return run.tokens_per_s, peer.memory()["rss_mib"]

                runs = turns(peers, counts.growth, act)
                result["clients"].append({"clients": clients, **{name: {
                    "tokens_per_s": median(rate for rate, _ in values), "rss_mib": values[-1][1]}
                    for name, values in runs.items()}})
                self.say(f"{clients} clients: {result['clients'][-1]}")
            close(connected)
        for context in counts.growth_contexts:
            with self.pipit(slots=1, context=context) as pipit, self.server(slots=1, context=context) as server:
                prompts = Prompts(server.tokens)
                peers = [pipit, server]
                rest = counts.growth_tokens + 64
                texts = [prompts.text(context - rest) for _ in range(counts.growth_contexts_rounds)]
                rounds = {peer.name: list(texts) for peer in peers}
                connected = {peer.name: [peer.client()] for peer in peers}

                def act(peer, rounds=rounds, connected=connected):
                    first, longest = prompts.endings(connected[peer.name][0].ask, rounds[peer.name].pop(0),
                                                     counts.growth_tokens)
                    return first, longest, peer.memory()["rss_mib"]

                runs = turns(peers, counts.growth_contexts_rounds, act)
                result["contexts"].append({"context": context, **{name: {
                    "prompt_tokens": values[0][0].prompt_tokens,
                    "prefill_per_s": median((first.prompt_tokens - first.cached_tokens) * 1000 / first.prompt_ms
                                            for first, _, _ in values),
                    "tokens_per_s": median(longest.streamed_rate for _, longest, _ in values),
                    "tokens": [longest.tokens for _, longest, _ in values],
                    "rss_mib": values[-1][2]} for name, values in runs.items()}})
                self.say(f"context {context}: {result['contexts'][-1]}")
                close(connected)
        return result

    def ollama(self):
        """One client and several of Ollama, where it is installed."""
        if not program("ollama"):
            return "not installed"
        counts, clients = self.counts, self.counts.crowd
        with Ollama(self.setup, self.context, clients) as peer:
            # Its tokens are not asked for: nothing here depends on them.
            prompts = Prompts(lambda text: len(text) // 4)
            connected = [peer.client() for _ in range(clients)]
            connected[0].ask(prompts.story(4))
            single = [connected[0].ask(prompts.story(counts.decode_tokens, stream=True)) for _ in range(counts.decode)]
            runs = [together(connected, [[prompts.story(counts.crowd_tokens)] * counts.crowd_requests] * clients)
                    for _ in range(counts.crowd_rounds)]
            return {"decode": spread(answer.streamed_rate for answer in single),
                    "crowd_tokens_per_s": spread(run.tokens_per_s for run in runs)}


def close(connected):
    for clients in connected.values():
        for client in clients:
            client.close()


def ratio(part, key):
    """pipit's median over llama-server's."""
    return part["pipit"][key]["median"] / part["llama-server"][key]["median"]


def fdatasync(folder, runs):
    """Milliseconds that appending 600 bytes and one fdatasync take on the disk of the state folder."""
    path = Path(folder) / "fdatasync"
    with open(path, "ab", buffering=0) as file:
        for _ in range(runs):
            started = time.perf_counter()
            file.write(bytes(600))
            os.fdatasync(file.fileno())
            yield (time.perf_counter() - started) * 1000
    path.unlink()
