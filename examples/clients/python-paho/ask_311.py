"""Ask a Pipit device over MQTT 3.1.1: python ask_311.py DEVICE PROMPT

The answer comes to the device's own topic pipit/v1/DEVICE/res/ID, or to --reply-to. It goes to stdout, the chunks
of a streamed one to stderr. Ctrl-C takes the request back.
"""

import argparse
import json
import queue
import sys
import uuid
from pathlib import Path

import paho.mqtt.client as mqtt


def arguments():
    parser = argparse.ArgumentParser(description="Ask a Pipit device over MQTT 3.1.1.")
    parser.add_argument("device")
    parser.add_argument("prompt")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--reply-to", metavar="TOPIC", help="where the answer goes, such as reply/me")
    parser.add_argument("--stream", action="store_true", help="show the answer as it grows")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--deadline-ms", type=int, metavar="MS", help="no answer when the work begins later than this")
    parser.add_argument("--schema", type=Path, metavar="FILE", help="JSON schema that the answer obeys")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS")
    return parser.parse_args()


def body(args):
    """The request: OpenAI's chat-completions body with a few fields more (docs/reference/request.schema.json)."""
    request = {
        "id": str(uuid.uuid4()),
        "messages": [{"role": "user", "content": args.prompt}],
        "max_tokens": args.max_tokens,
        "temperature": 0,
        "stream": args.stream,
    }
    if args.reply_to:
        request["reply_to"] = args.reply_to
    if args.deadline_ms is not None:
        request["deadline_ms"] = args.deadline_ms
    if args.schema:
        schema = json.loads(args.schema.read_text())
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return request


def main():
    args = arguments()
    base = f"pipit/v1/{args.device}"
    request = body(args)
    reply = args.reply_to or f"{base}/res/{request['id']}"
    final = queue.SimpleQueue()

    def on_connect(client, userdata, flags, reason, properties):
        client.subscribe(reply, qos=1)

    def on_subscribe(client, userdata, mid, reasons, properties):
        # Not before: an answer could be faster than the subscription. After a lost connection this sends the same
        # request again; its id makes that safe.
        client.publish(f"{base}/req", json.dumps(request), qos=1)

    def on_message(client, userdata, message):
        answer = json.loads(message.payload)
        if answer["id"] != request["id"]:
            return
        if answer.get("object") == "chat.completion.chunk":
            # A gap in seq is a lost chunk, 0 again is a new beginning: the whole answer follows in any case.
            text = answer["choices"][0]["delta"]["content"]
            print(f"chunk {answer['seq']}: {json.dumps(text)}", file=sys.stderr, flush=True)
        else:
            final.put(answer)

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.on_connect, client.on_subscribe, client.on_message = on_connect, on_subscribe, on_message
    client.connect(args.host, args.port)
    client.loop_start()
    try:
        answer = final.get(timeout=args.timeout)
    except (KeyboardInterrupt, queue.Empty):
        # Nobody waits any longer: the device need not work for it. It answers `cancelled`.
        client.publish(f"{base}/cancel", json.dumps({"id": request["id"]}), qos=1)
        answer = final.get(timeout=10)
    client.disconnect()
    client.loop_stop()
    if "error" in answer:
        sys.exit("{code}: {message}".format(**answer["error"]))
    print(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
