#!/usr/bin/env python3
"""Ask a Pipit device over HTTP with the openai package, as one would ask OpenAI.

The device has `[http] listen = "127.0.0.1:8080"` in its configuration; see README.md.
"""

import argparse
import json
import sys

import openai


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--socket", help="the device's Unix socket, in place of an address")
    parser.add_argument("--key", default="none", help="the device's key, where it has one")
    parser.add_argument("--stream", action="store_true", help="show the answer while it is written")
    parser.add_argument("--schema", help="a file with a JSON schema that the answer obeys")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--deadline-ms", type=int, help="give up when the work has not begun by then")
    return parser.parse_args()


def connect(options):
    if options.socket is None:
        return openai.OpenAI(base_url=options.url, api_key=options.key)
    # The package brings its own HTTP client; which one it is called depends on its version.
    try:
        import httpx2 as httpx
    except ImportError:
        import httpx
    transport = httpx.HTTPTransport(uds=options.socket)
    return openai.OpenAI(
        base_url="http://localhost/v1", api_key=options.key, http_client=httpx.Client(transport=transport)
    )


def main():
    options = arguments()
    client = connect(options)
    request = {
        # A device has one model; its name is for who reads the log.
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
    }
    if options.schema:
        with open(options.schema, encoding="utf-8") as file:
            schema = json.load(file)
        request["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    # What OpenAI does not have goes into extra_body: deadline_ms, priority, adapter, top_k, id ...
    if options.deadline_ms is not None:
        request["extra_body"] = {"deadline_ms": options.deadline_ms}
    if not options.stream:
        answer = client.chat.completions.create(**request)
        print(answer.choices[0].message.content)
        print(f"{answer.usage.completion_tokens} tokens by {answer.model_sha256[:12]}", file=sys.stderr)
        return
    for chunk in client.chat.completions.create(**request, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except openai.APIStatusError as error:
        sys.exit(f"{error.code}: {error.body['message']}")
    except openai.APIError as error:
        sys.exit(f"error: {error}")
