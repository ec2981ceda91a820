"""Ask a Pipit device over MQTT 5: python ask_5.py DEVICE PROMPT

The request carries a Response Topic and Correlation Data, the answer brings the Correlation Data back. It goes to
stdout, the chunks of a streamed one to stderr. Ctrl-C takes the request back.
"""

import argparse
import json
import queue
import sys
import uuid
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


def arguments():
    parser = argparse.ArgumentParser(description="Ask a Pipit device over MQTT 5.")
    parser.add_argument("device")
    parser.add_argument("prompt")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--stream", action="store_true", help="show the answer as it grows")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--deadline-ms", type=int, metavar="MS", help="no answer when the work begins later than this")
    parser.add_argument("--schema", type=Path, metavar="FILE", help="JSON schema that the answer obeys")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS")
    return parser.parse_args()


def body(args):
    """The request: OpenAI's chat-completions body with a few fields more (docs/reference/request.schema.json)."""
    request = {
        "messages": [{"role": "user", "content": args.prompt}],
        "max_tokens": args.max_tokens,
        "temperature": 0,
        "stream": args.stream,
    }
    if args.deadline_ms is not None:
        request["deadline_ms"] = args.deadline_ms
    if args.schema:
        schema = json.loads(args.schema.read_text())
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return request


def main():
    args = arguments()
    base = f"pipit/v1/{args.device}"
    payload = json.dumps(body(args))
    # One reply topic serves all requests of a client. Correlation Data that is an id is the request's id, too: that is
    # what a cancel names.
    reply, correlation = f"reply/{uuid.uuid4()}", str(uuid.uuid4())
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = reply
    properties.CorrelationData = correlation.encode()
    properties.ContentType = "application/json"
    final = queue.SimpleQueue()

    def on_connect(client, userdata, flags, reason, _):
        client.subscribe(reply, qos=1)

    def on_subscribe(client, userdata, mid, reasons, _):
        # Not before: an answer could be faster than the subscription. After a lost connection this sends the same
        # request again; its id makes that safe.
        client.publish(f"{base}/req", payload, qos=1, properties=properties)

    def on_message(client, userdata, message):
        if message.properties.CorrelationData != correlation.encode():
            return
        answer = json.loads(message.payload)
        if answer.get("object") == "chat.completion.chunk":
            # A gap in seq is a lost chunk, 0 again is a new beginning: the whole answer follows in any case.
            text = answer["choices"][0]["delta"]["content"]
            print(f"chunk {answer['seq']}: {json.dumps(text)}", file=sys.stderr, flush=True)
        else:
            final.put(answer)

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_connect, client.on_subscribe, client.on_message = on_connect, on_subscribe, on_message
    client.connect(args.host, args.port)
    client.loop_start()
    try:
        answer = final.get(timeout=args.timeout)
    except (KeyboardInterrupt, queue.Empty):
        # Nobody waits any longer: the device need not work for it. It answers `cancelled`.
        client.publish(f"{base}/cancel", json.dumps({"id": correlation}), qos=1)
        answer = final.get(timeout=10)
    client.disconnect()
    client.loop_stop()
    if "error" in answer:
        sys.exit("{code}: {message}".format(**answer["error"]))
    print(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
