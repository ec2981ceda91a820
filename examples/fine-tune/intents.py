#!/usr/bin/env python3
"""The small task of prompt and prefix tuning: the name of the intent behind a sentence.

    intents.py SMART_HOME.jsonl [--rows N] > intents.jsonl

Reads the rows of ../smart-home/make_dataset.py and writes rows with `prompt`, `completion` and `language`.
"""
import argparse
import json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--rows", dest="limit", type=int, default=None)
    options = parser.parse_args()
    with open(options.rows, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number == options.limit:
                break
            row = json.loads(line)
            text = {message["role"]: message["content"] for message in row["messages"]}
            print(json.dumps({
                "language": row["language"],
                "prompt": f"{text['user']}\nIntent:",
                "completion": " " + json.loads(text["assistant"])["intent"],
            }, ensure_ascii=False))


main()
