#!/usr/bin/env python3
"""What TLS costs a request: the same device model, with and without certificates on both sides, in turns.

Needs mosquitto, openssl, paho-mqtt, a built pipit and a small model. Prints one JSON object: the median milliseconds of a
request over a connection that stands, for each way, and of making a connection.

    python3 runtime/bench/tls.py target/debug/pipit tiny.gguf
"""

import json
import queue
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import paho.mqtt.client as mqtt

ROUNDS, REQUESTS, CONNECTIONS = 6, 100, 30
NEW_KEY = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"]


def certificates(folder):
    def run(*words):
        subprocess.run(words, check=True, capture_output=True, cwd=folder)

    run(*NEW_KEY, "-x509", "-days", "2", "-subj", "/CN=bench", "-addext", "basicConstraints=critical,CA:TRUE",
        "-keyout", "ca.key", "-out", "ca.pem")
    for name, extension in [("server", "subjectAltName=DNS:localhost"), ("client", "extendedKeyUsage=clientAuth")]:
        run(*NEW_KEY, "-subj", f"/CN={name}", "-addext", extension, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        run("openssl", "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-copy_extensions", "copy", "-out", f"{name}.pem")


class Way:
    """A broker, a device on it and a client, all with TLS or all without."""

    def __init__(self, folder, port, tls, program, model):
        self.port, self.tls, self.folder = port, tls, folder
        config = f"user root\nlistener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
        toml = "[model]\nthreads = 1\nn_ctx = 256\n"
        if tls:
            config += "cafile ca.pem\ncertfile server.pem\nkeyfile server.key\nrequire_certificate true\n"
            toml += '[broker]\nca = "ca.pem"\ncertificate = "client.pem"\nkey = "client.key"\n'
        (folder / f"{port}.conf").write_text(config)
        (folder / f"{port}.toml").write_text(toml)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        self.broker = subprocess.Popen(["/usr/sbin/mosquitto", "-c", f"{port}.conf"], **quiet)
        time.sleep(0.5)
        scheme = "mqtts" if tls else "mqtt"
        self.device = subprocess.Popen(
            [program, "serve", "--config", f"{port}.toml", "--broker", f"{scheme}://localhost:{port}", "--device", "d",
             "--model", model, "--state-dir", f"state-{port}"], **quiet)
        self.answers = queue.Queue()
        self.client = self.connect(subscribe=True)
        self.ask("warm", patience=60)

    def connect(self, subscribe=False):
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        if self.tls:
            own = [str(self.folder / name) for name in ("ca.pem", "client.pem", "client.key")]
            client.tls_set(*own, tls_version=ssl.PROTOCOL_TLS_CLIENT)
        client.on_socket_open = lambda _client, _data, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected, subscribed = queue.Queue(), queue.Queue()
        client.on_connect = lambda *_: connected.put(True)
        client.on_subscribe = lambda *_: subscribed.put(True)
        client.on_message = lambda _client, _data, message: self.answers.put(message.payload)
        client.connect("localhost", self.port)
        client.loop_start()
        connected.get(timeout=10)
        if subscribe:
            client.subscribe("pipit/v1/d/res/#", qos=1)
            subscribed.get(timeout=10)
        return client

    def ask(self, name, patience=20):
        body = {"id": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
        until = time.monotonic() + patience
        while True:
            since = time.monotonic()
            self.client.publish("pipit/v1/d/req", json.dumps(body), qos=1)
            try:
                self.answers.get(timeout=2)
                return (time.monotonic() - since) * 1000
            except queue.Empty:
                if time.monotonic() > until:
                    raise

    def time_connection(self):
        since = time.monotonic()
        client = self.connect()
        took = (time.monotonic() - since) * 1000
        client.disconnect()
        client.loop_stop()
        return took

    def end(self):
        for process in (self.device, self.broker):
            process.terminate()
            process.wait(timeout=10)


def main():
    program, model = (str(Path(path).resolve()) for path in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        certificates(folder)
        ways = {"plain": Way(folder, 21883, False, program, model), "mtls": Way(folder, 28883, True, program, model)}
        requests, connections = {name: [] for name in ways}, {name: [] for name in ways}
        for turn in range(ROUNDS):
            for name, way in ways.items():
                requests[name] += [way.ask(f"{turn}-{at}") for at in range(REQUESTS)]
                connections[name] += [way.time_connection() for _ in range(CONNECTIONS // ROUNDS)]
        for way in ways.values():
            way.end()
        median = {name: round(statistics.median(times), 2) for name, times in requests.items()}
        connect = {name: round(statistics.median(times), 2) for name, times in connections.items()}
        print(json.dumps({"request_ms": median, "connection_ms": connect, "requests": ROUNDS * REQUESTS}))


if __name__ == "__main__":
    main()
