#!/usr/bin/env python3
"""Rows for models without a chat template, and the small task of prompt and prefix tuning: the intent's name alone.

    intents.py SMART_HOME.jsonl [--rows N] [--whole] > intents.jsonl

Reads the rows of ../smart-home/make_dataset.py and writes rows with `prompt`, `completion` and `language`; the completion is
the name of the intent, or with --whole all of the answer.
"""
import argparse
import json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--rows", dest="limit", type=int, default=None)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    with open(options.rows, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number == options.limit:
                break
            row = json.loads(line)
            text = {message["role"]: message["content"] for message in row["messages"]}
            answer = text["assistant"] if options.whole else json.loads(text["assistant"])["intent"]
            print(json.dumps({
                "language": row["language"],
                "prompt": f"{text['user']}\nIntent:",
                "completion": f" {answer}",
            }, ensure_ascii=False))


main()
