"""Makes convert/tests/fixtures/cards.json: what gguf-py's Metadata says of models as people publish them.

    python make_cards.py LLAMA_CPP_DIR

LLAMA_CPP_DIR is a source tree of llama.cpp; gguf-py is taken from it. Needs numpy and PyYAML.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "fixtures" / "cards.json"
SMOLLM2 = """---
library_name: transformers
license: apache-2.0
language:
- en
- no
pipeline_tag: text-generation
tags:
- safetensors
- onnx
base_model:
- HuggingFaceTB/SmolLM2-135M
datasets:
- HuggingFaceTB/smol-smoltalk
---

# SmolLM2
"""
MERGE = """---
base_model:
- mistralai/Mistral-7B-Instruct-v0.2
- https://huggingface.co/teknium/OpenHermes-2.5-Mistral-7B
- https://example.org/models/one
- name: Own Model
  organization: Own House
  repo_url: https://example.org/own
  version: v2
- plain-name
dataset: https://huggingface.co/datasets/argilla/dpo-mix-7k
language: en
tags: merge
license: other
license_name: own-licence
license_link: https://example.org/licence
---
"""
OWN = """---
name: My Model
model_creator: Some One
model_type: mistral
version: "1.5"
organization: A House
description: >-
  Two lines
  of text.
finetune: tuned
size_label: 9B
url: https://example.org
repo_url: https://example.org/git
license:
- mit
- apache-2.0
---
"""
SAMPLING = dict(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.05, do_sample=True,
                eos_token_id=[1, 2], mirostat=2, mirostat_tau=5.0, mirostat_eta=0.1, penalty_last_n=64)
# folder, _name_or_path, number of parameters, card, generation_config.json
CASES = [
    ("SmolLM2-135M-Instruct", "", 134515008, SMOLLM2, {}),
    ("run-7", "HuggingFaceTB/SmolLM2-360M-Instruct", 361821120, "", SAMPLING),
    ("out", "/home/someone/models/out", 361821120, "", dict(temperature=None, top_k=50)),
    ("Meta-Llama-3.1-8B-Instruct", "", 8030261312, "# no front matter\n", {}),
    ("Llama-3-8B-Instruct-128k-v0.3", "", 8030261312, "---\n---\n", {}),
    ("Mistral-7B-Merge-14-v0.1", "./Mistral-7B-Merge-14-v0.1", 7241732096, MERGE, {}),
    ("mistral", "", 7241732096, OWN, {}),
    ("gemma-3-270m-it", "", 268098176, "---\nlicense: gemma\ntags: [gemma3, gemma]\n---\n", {}),
    ("bloom-7b1-Q8_0", "", 7069016064, "", {}),
    ("Mixtral-8x7B-fp16", "", 46702792704, "", {}),
    ("Phi-3-mini-4k-instruct", "", 3821079552, "", {}),
    ("qwen2.5-0.5b-instruct", "", 494032768, "", {}),
    ("Qwen3-0.6B", "", 596049920, "", {}),
    ("Qwen3-30B-A3B-v2", "", 30532122624, "", {}),
    ("OLMo-2-0425-1B", "", 1484916736, "", {}),
    ("LFM2-1.2B", "", 1170340608, "", {}),
    ("granite-3.3-2b-instruct", "", 2533531648, "", {}),
    ("t5-v1-1-small-lora", "", 76961152, "", {}),
    ("tiny", "", 23000, "", {}),
    ("my--odd-name-", "", 999, "", {}),
    ("v1-2", "", 3_200_000_000_000, "", {}),
    ("A model of ours", "", 12345678, "", {}),
]


class Writer:
    """Takes what a GGUFWriter would write."""

    def __init__(self):
        self.keys = {}

    def add_string(self, key, value):
        self.keys[key] = value

    add_array = add_uint32 = add_int32 = add_string

    def add_float32(self, key, value):
        self.keys[key] = float(np.float32(value))


def main():
    sys.path.insert(0, str(Path(sys.argv[1]) / "gguf-py"))
    import gguf

    for name in dir(gguf.GGUFWriter):
        if name.startswith("add_") and not hasattr(Writer, name):
            setattr(Writer, name, getattr(gguf.GGUFWriter, name))
    cases = []
    for folder, path, parameters, card, generation in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / folder
            model.mkdir()
            config = {"_name_or_path": path} if path else {}
            (model / "config.json").write_text(json.dumps(config))
            (model / "generation_config.json").write_text(json.dumps(generation))
            (model / "README.md").write_text(card)
            metadata = gguf.Metadata.load(None, model, None, parameters)
            if metadata.size_label is None:
                metadata.size_label = gguf.size_label(parameters, 0, 0, 0)
            writer = Writer()
            metadata.set_gguf_meta_model(writer)
        cases.append(dict(folder=folder, name_or_path=path, parameters=parameters, card=card, generation=generation,
                          keys=writer.keys))
    OUT.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
