"""The programs that are compared, each with the same model, threads, KV types and context."""

import http.client
import json
import re
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho

from .clients import HttpClient, MqttClient
from .processes import Process, free_port, memory, program, until

DEVICE = "bench"


@dataclass
class Setup:
    """What all of them get."""

    model: Path
    threads: int
    cache_type: str
    pipit: Path
    llama_bin: Path
    scratch: Path


class Broker:
    """mosquitto on loopback, sessions in memory. Without `nodelay` it is as a distribution configures it: a message
    behind one that is not yet acknowledged waits for the delayed TCP acknowledgement, up to 40 ms."""

    def __init__(self, scratch, nodelay=True):
        self.port = free_port()
        config = scratch / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay {str(nodelay).lower()}\n")
        path = program("mosquitto", "/usr/sbin/mosquitto")
        if not path:
            raise SystemExit("error: mosquitto is not installed\n  hint: scripts/install-packages --tests")
        self.process = Process([path, "-c", config], scratch / "mosquitto.log")
        until(self.listens, "mosquitto", limit=10, process=self.process)

    def listens(self):
        try:
            MqttClient(self.port, DEVICE, "first").close()
        except OSError:
            return False
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stop()


class Pipit:
    """`pipit serve`, connected to the broker."""

    name = "pipit"

    def __init__(self, setup, broker, context, slots, state=None, idle_unload_s=0):
        self.broker, self.made = broker, 0
        self.folder = None
        if state is None:
            self.folder = tempfile.TemporaryDirectory(dir=setup.scratch)
            state = self.folder.name
        config = setup.scratch / "pipit.toml"
        config.write_text(f"""device = "{DEVICE}"
state_dir = "{state}"
[broker]
url = "mqtt://127.0.0.1:{broker.port}"
[model]
path = "{setup.model}"
n_ctx = {context}
slots = {slots}
threads = {setup.threads}
cache_type_k = "{setup.cache_type}"
cache_type_v = "{setup.cache_type}"
idle_unload_s = {idle_unload_s}
""")
        self.states = []
        subscribed = threading.Event()
        self.watch = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.watch.on_connect = lambda client, *_: client.subscribe(f"pipit/v1/{DEVICE}/status", qos=1)
        self.watch.on_subscribe = lambda *_: subscribed.set()
        self.watch.on_message = self.heard
        self.watch.connect("127.0.0.1", broker.port)
        self.watch.loop_start()
        subscribed.wait(10)
        self.started = time.perf_counter()
        self.process = Process([setup.pipit, "serve", "--config", config], setup.scratch / "pipit.log")
        until(lambda: self.state() == "ready", "pipit is ready", process=self.process)
        self.ready_s = self.states[-1][0] - self.started

    def heard(self, _client, _data, message):
        # What an earlier daemon has left behind is of no interest.
        if not message.retain:
            self.states.append((time.perf_counter(), json.loads(message.payload)["state"]))

    def state(self):
        return self.states[-1][1] if self.states else None

    def client(self):
        self.made += 1
        return MqttClient(self.broker.port, DEVICE, f"client-{self.made}")

    def memory(self):
        """Of daemon and worker together."""
        return memory([self.process.pid, *self.process.children()])

    def memory_unloaded(self):
        """Of the daemon alone, when `idle_unload_s` has passed."""
        until(lambda: not self.process.children(), "the model is unloaded", process=self.process)
        return memory([self.process.pid])

    def stop(self):
        self.process.stop()
        self.watch.disconnect()
        self.watch.loop_stop()
        if self.folder:
            self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class LlamaServer:
    """llama-server; without `slots` it has its own defaults."""

    name = "llama-server"

    def __init__(self, setup, context, slots=None):
        self.port = free_port()
        command = [setup.llama_bin / "llama-server", "-m", setup.model, "-c", context, "-t", setup.threads,
                   "-ctk", setup.cache_type, "-ctv", setup.cache_type, "--port", self.port]
        if slots:
            command += ["-np", slots]
        self.started = time.perf_counter()
        self.process = Process(command, setup.scratch / "llama-server.log")
        self.ready_s = until(self.healthy, "llama-server is ready", process=self.process) - self.started

    def healthy(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def tokens(self, text):
        """Tokens of a text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/tokenize", json.dumps({"content": text}), {"Content-Type": "application/json"})
        count = len(json.loads(connection.getresponse().read())["tokens"])
        connection.close()
        return count

    def client(self):
        return HttpClient(self.port)

    def memory(self):
        return memory([self.process.pid])

    def stop(self):
        self.process.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Ollama:
    """Ollama with the same GGUF file, in a folder of its own."""

    name = "ollama"

    def __init__(self, setup, context, slots):
        self.port = free_port()
        self.folder = tempfile.TemporaryDirectory(dir=setup.scratch)
        environment = {"OLLAMA_HOST": f"127.0.0.1:{self.port}", "OLLAMA_MODELS": self.folder.name,
                       "OLLAMA_NUM_PARALLEL": str(slots), "OLLAMA_KV_CACHE_TYPE": setup.cache_type,
                       "OLLAMA_FLASH_ATTENTION": "1"}
        path = program("ollama")
        self.process = Process([path, "serve"], setup.scratch / "ollama.log", environment)
        until(self.answers, "ollama is ready", process=self.process)
        modelfile = Path(self.folder.name) / "Modelfile"
        # num_ctx is for one slot there.
        modelfile.write_text(f"FROM {setup.model}\nPARAMETER num_ctx {context // slots}\n"
                             f"PARAMETER num_thread {setup.threads}\n")
        with Process([path, "create", "bench", "-f", modelfile], setup.scratch / "ollama.log", environment) as create:
            if create.child.wait(120):
                create.check()

    def answers(self):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/api/version")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def client(self):
        return HttpClient(self.port, model="bench")

    def stop(self):
        self.process.stop()
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def llama_bench(setup, prompt, generate, depth=0):
    """Tokens a second that llama-bench measures in one repetition."""
    command = [setup.llama_bin / "llama-bench", "-m", setup.model, "-t", setup.threads, "-ctk", setup.cache_type,
               "-ctv", setup.cache_type, "-p", prompt, "-n", generate, "-d", depth, "-r", 1, "-o", "json"]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)[0]["avg_ts"]


def versions(setup):
    """What was measured."""
    def first_line(*command):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip().splitlines()[0]

    server = subprocess.run([setup.llama_bin / "llama-server", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version: (.*)", server.stdout + server.stderr)
    return {"pipit": first_line(setup.pipit, "--version"), "llama-server": found[1] if found else "unknown",
            "ollama": first_line("ollama", "--version") if program("ollama") else "not installed"}
