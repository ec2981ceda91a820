"""Tests of make_dataset.py, on its real packages: python -m unittest (needs requirements.txt)."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

SCRIPT = Path(__file__).with_name("make_dataset.py")


def make(folder, *arguments, hash_seed="0"):
    """Run the script; (its process, training rows, held-out rows)."""
    train, held = Path(folder, "train.jsonl"), Path(folder, "eval.jsonl")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", train, "--eval-out", held, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return done, train, held


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(row):
    return row["messages"][1]["content"]


class MakeDataset(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def test_rows_are_conversations_with_a_json_answer_and_none_is_in_both_files(self):
        done, train, held = make(self.folder, "--rows", "40", "--eval-rows", "10")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((len(rows(train)), len(rows(held))), (160, 40))
        for row in rows(train) + rows(held):
            self.assertIn(row["language"], {"nl", "fr", "de", "en"})
            self.assertEqual([m["role"] for m in row["messages"]], ["system", "user", "assistant"])
            answer = json.loads(row["messages"][2]["content"])
            self.assertEqual(list(answer), ["intent", "slots"])
            self.assertTrue(answer["intent"].startswith("Hass"))
        texts = [said(row).casefold() for row in rows(train) + rows(held)]
        self.assertEqual(len(texts), len(set(texts)))

    def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(self):
        def sample(seed, hash_seed):
            with tempfile.TemporaryDirectory() as folder:
                arguments = ["--languages", "nl", "--rows", "20", "--eval-rows", "5", "--seed", seed]
                done, train, held = make(folder, *arguments, hash_seed=hash_seed)
                self.assertEqual(done.returncode, 0, done.stderr)
                return train.read_bytes() + held.read_bytes()

        first = sample("1", "1")
        self.assertEqual(first, sample("1", "2"))
        self.assertNotEqual(first, sample("2", "1"))

    def test_own_rooms_and_devices_take_the_place_of_the_built_in_ones(self):
        arguments = ["--languages", "nl", "--rows", "30", "--eval-rows", "1"]
        done, train, _ = make(self.folder, *arguments, "--areas", "serre,kelder", "--names", "zwembadpomp=switch")
        self.assertEqual(done.returncode, 0, done.stderr)
        slots = [json.loads(row["messages"][2]["content"])["slots"] for row in rows(train)]
        self.assertLessEqual({slot["area"] for slot in slots if "area" in slot}, {"serre", "kelder"})
        self.assertLessEqual({slot["name"] for slot in slots if "name" in slot}, {"zwembadpomp"})

    def test_a_sentence_that_is_to_be_kept_out_is(self):
        arguments = ["--languages", "en", "--rows", "30", "--eval-rows", "5"]
        _, train, _ = make(self.folder, *arguments)
        sentence = said(rows(train)[0])
        _, train, held = make(self.folder, *arguments, "--without", sentence.upper())
        self.assertNotIn(sentence.casefold(), {said(row).casefold() for row in rows(train) + rows(held)})

    def test_an_unknown_language_is_one_line_and_no_file(self):
        done, train, held = make(self.folder, "--languages", "nl,xx", "--rows", "5", "--eval-rows", "5")
        self.assertEqual(done.returncode, 1)
        self.assertTrue(done.stderr.startswith("error: xx: "), done.stderr)
        self.assertIn("hint:", done.stderr)
        self.assertEqual(os.listdir(self.folder), [])

    def test_no_rows_at_all_is_a_usage_error(self):
        arguments = ["--languages", "nl", "--rows", "1", "--eval-rows", "1"]
        done, *_ = make(self.folder, *arguments, "--rows", "0")
        self.assertEqual(done.returncode, 2, done.stderr)


if __name__ == "__main__":
    unittest.main()
