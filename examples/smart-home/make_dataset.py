#!/usr/bin/env python3
"""Make a fine-tuning set of smart-home requests from Home Assistant's own sentences.

In:  the sentence templates of the package home-assistant-intents, and names of rooms and devices.
Out: JSONL, one conversation a line: {"language": "nl", "messages": [system, user, assistant]}, where the
     assistant's message is one compact JSON object, {"intent": "HassTurnOn", "slots": {"area": "keuken"}}.

A sentence is a random walk through a template; its label is what Home Assistant's recogniser (hassil)
understands in the finished sentence, so a sentence that it does not understand is thrown away. Sentences with
free text in them (a shopping list, a song) are left out. The same arguments give the same bytes.

Needs the packages of requirements.txt.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hassil.expression import Alternative, ListReference, Permutation, RuleReference, TextChunk
from hassil.intents import Intents, RangeSlotList, TextSlotList, WildcardSlotList
from hassil.numbers import get_rbnf_engine
from hassil.recognize import recognize
from hassil.util import normalize_whitespace
from home_assistant_intents import get_intents

from homes import HOMES

SYSTEM = "You control a smart home. Answer with one JSON object holding the intent and its slots."

# How often an intent is tried. Lights, covers and heating are what people ask for most.
INTENT_WEIGHTS = {
    "HassTurnOn": 5,
    "HassTurnOff": 5,
    "HassLightSet": 3,
    "HassClimateSetTemperature": 2,
    "HassClimateGetTemperature": 1,
    "HassSetPosition": 2,
    "HassGetState": 2,
    "HassSetVolume": 1,
    "HassStartTimer": 2,
    "HassCancelTimer": 1,
    "HassMediaPause": 1,
    "HassMediaNext": 1,
    "HassVacuumStart": 1,
    "HassGetWeather": 1,
    "HassGetCurrentTime": 1,
}
LIGHTS_WEIGHT = 4  # A block of templates about lights is taken this many times as often as another one.
NUMBERS_IN_WORDS = 0.2  # "twintig" instead of "20"
CAPITAL_FIRST = 0.5  # "Zet ..." instead of "zet ..."
LEAVE_OUT = 0.3  # An optional word of a template is left out this often.
DEGREES = range(5, 31)  # The templates would take 0 to 100.
TRIES_PER_ROW = 60


class DatasetError(Exception):
    """Something that the caller can put right, with its hint."""


class MissingList(Exception):
    """The walk met a list that this home does not have."""


class Sampler:
    """Draws sentences of one language, each with the recogniser's label."""

    def __init__(self, language, areas, floors, devices, rng):
        data = get_intents(language)
        if data is None:
            raise DatasetError(f"{language}: home-assistant-intents has no such language")
        self.language = language
        self.rng = rng
        self.intents = Intents.from_dict(data)
        self.lists = {
            **self.intents.slot_lists,
            "area": TextSlotList.from_strings(areas, name="area", allow_template=False),
            "floor": TextSlotList.from_strings(floors, name="floor", allow_template=False),
            "name": TextSlotList.from_tuples(
                ((name, name, {"domain": domain}) for name, domain in devices.items()),
                name="name",
                allow_template=False,
            ),
        }
        self.blocks = {}
        for intent in self.intents.intents.values():
            if intent.name not in INTENT_WEIGHTS:
                continue
            blocks = [block for block in intent.data if block.sentences]
            weights = [
                len(block.sentences) * (LIGHTS_WEIGHT if block.slots.get("domain") == "light" else 1)
                for block in blocks
            ]
            self.blocks[intent.name] = (blocks, weights)

    def draw(self):
        """One sentence and its answer, or None when this walk led to nothing that the recogniser knows."""
        names = list(self.blocks)
        name = self.rng.choices(names, [INTENT_WEIGHTS[n] for n in names])[0]
        blocks, weights = self.blocks[name]
        block = self.rng.choices(blocks, weights)[0]
        template = self.rng.choice(block.sentences)
        rules = {**self.intents.expansion_rules, **block.expansion_rules}
        lists = {**self.lists, **block.slot_lists}
        try:
            text = normalize_whitespace(self.walk(template.expression, rules, lists)).strip()
        except MissingList:
            return None
        if self.rng.random() < CAPITAL_FIRST:
            text = text[:1].upper() + text[1:]
        if not text:
            return None
        found = recognize(text, self.intents, slot_lists=self.lists, language=self.language)
        if found is None or any(entity.is_wildcard for entity in found.entities_list):
            return None
        slots = {key: plain(entity.value) for key, entity in sorted(found.entities.items())}
        return text, {"intent": found.intent.name, "slots": slots}

    def walk(self, node, rules, lists):
        """One random path through a template."""
        if isinstance(node, TextChunk):
            return node.original_text
        if isinstance(node, Alternative):
            if node.is_optional and self.rng.random() < LEAVE_OUT:
                return ""
            return self.walk(self.rng.choice(node.items), rules, lists)
        if isinstance(node, RuleReference):
            return self.walk(rules[node.rule_name].expression, rules, lists)
        if isinstance(node, ListReference):
            return self.value(node.list_name, rules, lists)
        items = list(node.items)
        if isinstance(node, Permutation):
            self.rng.shuffle(items)
        return "".join(self.walk(item, rules, lists) for item in items)

    def value(self, list_name, rules, lists):
        values = lists.get(list_name)
        if isinstance(values, TextSlotList) and values.values:
            return self.walk(self.rng.choice(values.values).text_in, rules, lists)
        if isinstance(values, RangeSlotList):
            numbers = list(values.get_numbers())
            if list_name == "temperature":
                numbers = [number for number in numbers if number in DEGREES] or numbers
            number = self.rng.choice(numbers)
            if values.words and (not values.digits or self.rng.random() < NUMBERS_IN_WORDS):
                engine = get_rbnf_engine(values.words_language or self.language)
                spellings = set(engine.format_number(number).text_by_ruleset.values())
                return self.rng.choice(sorted(spellings))
            return str(number)
        if values is None or isinstance(values, (TextSlotList, WildcardSlotList)):
            raise MissingList(list_name)
        raise TypeError(f"{self.language}: the list {list_name} is a {type(values).__name__}")


def plain(value):
    """A slot's value as JSON has it: 20, not 20.0; no spaces around words."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def rows_of(language, count, seed, without, areas, floors, devices):
    """`count` different conversations of one language, none of them with a sentence of `without`."""
    sampler = Sampler(language, areas, floors, devices, random.Random(f"{seed}/{language}"))
    rows, seen, failures = [], {text.casefold() for text in without}, 0
    while len(rows) < count:
        if failures > TRIES_PER_ROW * 20:
            raise DatasetError(
                f"{language}: only {len(rows)} different sentences of the {count} asked for"
                "\n  hint: ask for fewer --rows, or give more --areas and --names"
            )
        drawn = sampler.draw()
        if drawn is None or drawn[0].casefold() in seen:
            failures += 1
            continue
        failures = 0
        text, answer = drawn
        seen.add(text.casefold())
        rows.append(
            {
                "language": language,
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {
                        "role": "assistant",
                        "content": json.dumps(answer, ensure_ascii=False, separators=(",", ":")),
                    },
                ],
            }
        )
    return rows


def write_jsonl(path, rows):
    """All rows or no file: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def home_for(language, args):
    """The rooms, floors and devices of a language, with the caller's own names in place of the defaults."""
    known = HOMES.get(language)
    if known is None and not (args.areas and args.names):
        raise DatasetError(
            f"{language}: no rooms and devices are known for this language"
            f"\n  hint: give --areas and --names, or choose from {', '.join(HOMES)}"
        )
    areas = args.areas or known.areas
    devices = args.names or known.devices
    return areas, known.floors if known else (), devices


def words(text):
    return tuple(word.strip() for word in text.split(",") if word.strip())


def devices(text):
    found = {}
    for word in words(text):
        name, _, domain = word.partition("=")
        found[name.strip()] = domain.strip() or "light"
    return found


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def arguments():
    parser = argparse.ArgumentParser(
        description="Make a fine-tuning set of smart-home requests from Home Assistant's own sentences.",
        epilog="example: make_dataset.py --rows 600 --eval-rows 50 --out train.jsonl --eval-out eval.jsonl",
    )
    parser.add_argument("--languages", type=words, default=("nl", "fr", "de", "en"), metavar="nl,fr,de,en")
    parser.add_argument("--rows", type=positive, default=600, metavar="N", help="training rows of EACH language (600)")
    parser.add_argument("--out", type=Path, required=True, metavar="F.jsonl")
    parser.add_argument("--eval-rows", type=positive, metavar="N", help="held-out rows of EACH language; none is in --out")
    parser.add_argument("--eval-out", type=Path, metavar="F.jsonl")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed gives the same bytes (1)")
    parser.add_argument("--areas", type=words, metavar="A,B", help="rooms, instead of the built-in ones")
    parser.add_argument("--names", type=devices, metavar="NAME[=DOMAIN],..", help="devices, instead of the built-in ones; the domain is light unless given")
    parser.add_argument("--without", action="append", default=[], metavar="TEXT", help="a sentence to keep out of both files, such as the one of a demonstration")
    args = parser.parse_args()
    if (args.eval_rows is None) != (args.eval_out is None):
        parser.error("--eval-rows and --eval-out go together")
    if not args.languages:
        parser.error("--languages is empty")
    return args


def main():
    args = arguments()
    started = time.monotonic()
    held_out = args.eval_rows or 0
    homes = [home_for(language, args) for language in args.languages]
    train, held = [], []
    with ProcessPoolExecutor(max_workers=min(len(homes), os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(rows_of, language, args.rows + held_out, args.seed, args.without, *home)
            for language, home in zip(args.languages, homes)
        ]
        for language, job in zip(args.languages, jobs):
            rows = job.result()
            held += rows[:held_out]
            train += rows[held_out:]
            print(f"{language}: {len(rows)} sentences, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    order = random.Random(args.seed)
    order.shuffle(train)
    order.shuffle(held)
    if args.eval_out:
        write_jsonl(args.eval_out, held)
    write_jsonl(args.out, train)
    print(f"{args.out}: {len(train)} rows" + (f"; {args.eval_out}: {len(held)} rows" if args.eval_out else ""))


if __name__ == "__main__":
    try:
        main()
    except (DatasetError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
