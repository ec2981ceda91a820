"""Clients: they send the same chat-completions body over MQTT or HTTP, and keep time."""

import http.client
import json
import queue
import socket
import threading
import time
from dataclasses import dataclass, field

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE = 300  # seconds


@dataclass
class Answer:
    """An answer and when it came, in milliseconds after the request was given to the socket."""

    first_ms: float | None
    total_ms: float
    text: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    #: What the server says: prefill, and decode in tokens a second.
    prompt_ms: float
    decode_rate: float
    extra: dict = field(default_factory=dict)

    @property
    def streamed_rate(self):
        """Tokens a second between the first chunk and the end, by the client's clock."""
        return (self.tokens - 1) * 1000 / (self.total_ms - self.first_ms)


class MqttClient:
    """One client of the daemon, MQTT 5, requests and answers at QoS 1."""

    def __init__(self, port, device, name):
        self.name, self.topic = name, f"pipit/v1/{device}/req"
        self.inbox, self.asked = {}, 0
        self.lock = threading.Lock()
        ready = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
        # Without it Nagle's algorithm holds a small packet back until the one before is acknowledged.
        self.client.on_socket_open = lambda _, __, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client.on_connect = lambda client, *_: client.subscribe(f"reply/{name}/#", qos=1)
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.on_message = self.received
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        if not ready.wait(10):
            raise TimeoutError("the broker does not answer")

    def received(self, _client, _data, message):
        now = time.perf_counter()
        inbox = self.inbox.get(message.topic)
        if inbox:
            inbox.put((now, message.payload))

    def ask(self, body):
        """Sends a request and waits for its final answer."""
        with self.lock:
            self.asked += 1
            topic = f"reply/{self.name}/{self.asked}"
        inbox = self.inbox[topic] = queue.SimpleQueue()
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = topic
        payload = json.dumps(body)
        started = time.perf_counter()
        self.client.publish(self.topic, payload, qos=1, properties=properties)
        first = None
        while True:
            now, payload = inbox.get(timeout=PATIENCE)
            message = json.loads(payload)
            if message.get("object") == "chat.completion.chunk":
                first = first or now
                continue
            del self.inbox[topic]
            if "error" in message:
                raise RuntimeError(f"pipit: {message['error']}")
            choice, timings, usage = message["choices"][0], message["timings"], message["usage"]
            return Answer((first - started) * 1000 if first else None, (now - started) * 1000,
                          choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"],
                          usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"],
                          timings["prompt_ms"], timings["predicted_per_second"], {"queue_ms": timings["queue_ms"]})

    def refused(self):
        """Milliseconds until a request that nobody can read is refused: broker, daemon and back, without journal or
        engine."""
        with self.lock:
            self.asked += 1
            topic = f"reply/{self.name}/{self.asked}"
        inbox = self.inbox[topic] = queue.SimpleQueue()
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = topic
        started = time.perf_counter()
        self.client.publish(self.topic, "{", qos=1, properties=properties)
        now, payload = inbox.get(timeout=PATIENCE)
        del self.inbox[topic]
        if json.loads(payload).get("error", {}).get("code") != "invalid_request":
            raise RuntimeError(f"pipit was to refuse this: {payload!r}")
        return (now - started) * 1000

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


class HttpClient:
    """One client of an OpenAI-like server, with a connection that is kept."""

    def __init__(self, port, model=None):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.model = model

    def ask(self, body):
        """Sends a request and waits for the end of its answer."""
        body = dict(body)
        if self.model:
            body["model"] = self.model
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        payload = json.dumps(body).encode()
        if self.connection.sock is None:
            self.connection.connect()
        started = time.perf_counter()
        try:
            response = self.send(payload)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # It was idle for longer than the server keeps one.
            self.connection.close()
            self.connection.connect()
            started = time.perf_counter()
            response = self.send(payload)
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        if body.get("stream"):
            return self.stream(response, started)
        message = json.loads(response.read())
        now = time.perf_counter()
        choice = message["choices"][0]
        return self.answer(None, (now - started) * 1000, choice["message"]["content"], choice["finish_reason"], message)

    def send(self, payload):
        self.connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
        return self.connection.getresponse()

    def stream(self, response, started):
        first, text, finish, last = None, "", "", {}
        while line := response.readline():
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                if line.startswith(b"data: [DONE]"):
                    break
                continue
            event = json.loads(line[6:])
            last.update({name: event[name] for name in ("usage", "timings") if event.get(name)})
            for choice in event["choices"]:
                finish = choice.get("finish_reason") or finish
                if piece := choice["delta"].get("content"):
                    first = first or now
                    text += piece
        ended = time.perf_counter()
        response.read()
        return self.answer((first - started) * 1000, (ended - started) * 1000, text, finish, last)

    @staticmethod
    def answer(first_ms, total_ms, text, finish, message):
        usage, timings = message["usage"], message.get("timings", {})
        return Answer(first_ms, total_ms, text, finish, usage["prompt_tokens"], timings.get("cache_n", 0),
                      usage["completion_tokens"], timings.get("prompt_ms", 0.0),
                      timings.get("predicted_per_second", 0.0))

    def close(self):
        self.connection.close()


@dataclass
class Crowd:
    """What several clients got together."""

    answers: list
    seconds: float

    @property
    def tokens(self):
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_s(self):
        return self.tokens / self.seconds

    @property
    def answers_per_s(self):
        return len(self.answers) / self.seconds


def together(clients, bodies):
    """Client i sends `bodies[i]`, one after another, all clients at the same time."""
    answers, errors = [], []
    gate = threading.Barrier(len(clients) + 1)

    def work(client, own):
        gate.wait()
        try:
            for body in own:
                answers.append(client.ask(body))
        except Exception as error:  # it is raised again below, in the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(clients, bodies, strict=True)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return Crowd(answers, seconds)
