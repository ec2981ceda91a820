"""Fills corpus/TARGET with messages and journals: python make_corpus.py TARGET"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
USER = {"role": "user", "content": "Turn on the light"}
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}, "next": {"$ref": "#/$defs/a"}},
          "patternProperties": {"^x": {"pattern": "^a+$"}}, "$defs": {"a": {"enum": [1]}}}
BODIES = [
    {"messages": [USER]},
    {"id": "a", "messages": [{"role": "system", "content": "s"}, USER], "max_tokens": 7, "temperature": 0.5,
     "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": -1, "stop": ["a", "b"], "stream": True, "deadline_ms": 9,
     "priority": 3, "adapter": "home", "reply_to": "reply/me"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}]}], "repeat_penalty": 1.1,
     "frequency_penalty": 0.5, "presence_penalty": -1, "repeat_last_n": 64, "n": 1, "tools": []},
    {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": SCHEMA}}},
    {"messages": [USER], "response_format": {"type": "json_object", "schema": SCHEMA}},
]


def message(payload, topic=None, correlation=None, kind=None, expiry=0):
    """A message in one input, as fuzz_targets/request.rs takes it apart."""
    strings = [topic, correlation, kind]
    head = bytes(255 if string is None else len(string) for string in strings) + bytes([expiry])
    return head + b"".join(string for string in strings if string is not None) + payload


def records():
    reply = {"topic": "reply/me", "correlation": [0, 255], "plain": False}
    request = {"id": "a", "fingerprint": None, "reply": reply, "messages": [USER], "sampling": {
        "temperature": None, "top_p": 0.5, "top_k": 3, "min_p": None, "repeat_penalty": None,
        "frequency_penalty": None, "presence_penalty": None, "repeat_last_n": None, "seed": 7},
        "max_tokens": 5, "stop": ["x"], "schema": None, "adapter": None, "stream": True, "deadline_ms": 9, "priority": 1}
    answer = {"reply": reply, "body": "{}", "json": True, "error": None, "fingerprint": None}
    key = ["reply/me", "a"]
    return [json.dumps(record).encode() for record in [
        {"record": "accepted", "at": 1, "request": request}, {"record": "done", "at": 2, "key": key, "answer": answer},
        {"record": "delivered", "key": key}, {"record": "erased", "key": key}]]


def inputs(target):
    if target == "request":
        bodies = [json.dumps(body).encode() for body in BODIES]
        return [message(body) for body in bodies] + [
            message(b"Turn on the light", b"reply/me", b"\x01\x02", b"text/plain", 3),
            message(bodies[0], b"pipit/v1/dev/res/x", b"abc", b"application/json", 200),
            message(b'{"id":"a"}', b"$SYS/x"),
        ]
    if target == "journal":
        framed = [b"\x01" + b"\n".join(records()[:many]) for many in range(1, 5)]
        return framed + [b"\x00", b"\x00PIPITJ1\n", b"\x00PIPITJ1\n\x02\x00\x00\x00\x00\x00\x00\x00{}", b"\x00other"]
    sys.exit(f"no target {target}")


folder = HERE / "corpus" / sys.argv[1]
folder.mkdir(parents=True, exist_ok=True)
for at, data in enumerate(inputs(sys.argv[1])):
    (folder / f"fixture-{at}").write_bytes(data)
