#!/usr/bin/env python3
"""What tests/shrink.rs expects of `shrink`, from torch and transformers: influence of blocks, sizes of heads and channels,
and the logits of the model without those that go.

    python shrink.py ../fixtures                      writes shrink.json, from the tiny models that are there
    python shrink.py PIPIT_DISTILL MODEL DATA WORK    shrinks a real checkpoint, loads it in transformers, and compares
                                                      with the same blocks taken out in torch

Seen with torch 2.15, transformers 5.23.
"""
import json
import pathlib
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
TEXTS = [[5, 17, 200, 31, 9, 77, 120], [64, 3, 91], [8, 8, 250, 13, 99, 41, 42, 43, 44, 45, 46, 47]]
# name → kept blocks, key and value heads, query heads, channels
CUTS = {"tiny-tied": ([0, 1], 2, 2, 61), "tiny-untied": ([1], 1, 2, 96), "tiny-qwen2": ([0, 1], 1, 1, 40),
        "tiny-qwen3": ([0], 2, 2, 33), "tiny-gemma3": ([0, 2], 1, 1, 30)}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def head_dim_of(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def measured(model):
    """(influence, heads, channels) of every block, by hooks."""
    layers, head_dim = model.model.layers, head_dim_of(model.config)
    sums, seen, tokens = [0.0] * len(layers), {}, 0
    heads, channels = [0.0] * len(layers), [0.0] * len(layers)

    def hook(key, take):
        return lambda module, args, out: seen.__setitem__(key, take(args, out))

    first = lambda out: out[0] if isinstance(out, tuple) else out
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, a, kw, out, i=i: seen.__setitem__(
            ("block", i), ((a[0] if a else kw["hidden_states"])[0], first(out).reshape(-1, model.config.hidden_size))),
            with_kwargs=True)
        layer.self_attn.o_proj.register_forward_hook(hook(("heads", i), lambda a, o: a[0][0]))
        layer.mlp.down_proj.register_forward_hook(hook(("channels", i), lambda a, o: a[0][0]))
    for text in TEXTS:
        model(input_ids=torch.tensor([text]))
        tokens += len(text)
        for i in range(len(layers)):
            x, y = seen["block", i]
            sums[i] += torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).sum().item()
            of_heads = seen["heads", i].double().reshape(len(text), -1, head_dim).norm(dim=-1).mean(0)
            heads[i] = heads[i] + of_heads ** 2
            channels[i] = channels[i] + seen["channels", i].double().abs().mean(0) ** 2
    return ([1 - s / tokens for s in sums], [h.sqrt().tolist() for h in heads], [c.sqrt().tolist() for c in channels])


def best(scores, count):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return sorted(order)


@torch.no_grad()
def cut(model, layers, heads, channels, sizes):
    """Takes blocks out, and zeroes heads and channels in place: what goes contributes nothing."""
    kv_heads, q_heads, ffn = sizes
    config, head_dim = model.config, head_dim_of(model.config)
    group = config.num_attention_heads // config.num_key_value_heads
    for i in layers:
        layer = model.model.layers[i]
        groups = [sum(heads[i][g * group:(g + 1) * group]) for g in range(config.num_key_value_heads)]
        stay = [g * group + h for g in best(groups, kv_heads)
                for h in best(heads[i][g * group:(g + 1) * group], q_heads // kv_heads)]
        for head in set(range(config.num_attention_heads)) - set(stay):
            layer.self_attn.o_proj.weight[:, head * head_dim:(head + 1) * head_dim] = 0
        for channel in set(range(config.intermediate_size)) - set(best(channels[i], ffn)):
            layer.mlp.down_proj.weight[:, channel] = 0
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


@torch.no_grad()
def logits(model, text):
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


def fixtures(folder):
    out = {"texts": TEXTS, "models": {}}
    for name, (layers, *sizes) in CUTS.items():
        model = load(folder / name)
        influence, heads, channels = measured(model)
        small = cut(load(folder / name), layers, heads, channels, sizes)
        out["models"][name] = {"layers": layers, "num_key_value_heads": sizes[0], "num_attention_heads": sizes[1],
                               "intermediate_size": sizes[2], "influence": influence, "heads": heads,
                               "channels": channels, "logits": logits(small, TEXTS[2])[-1].tolist()}
    (folder / "shrink.json").write_text(json.dumps(out) + "\n")


def check(program, model, data, work):
    run = lambda *args: json.loads(subprocess.run([program, "shrink", "--model", model, "--json", "-q", *map(str, args)],
                                                  check=True, capture_output=True, text=True).stdout)
    done = run("--layers", 20, "--data", data, "--max-rows", 8, "-o", work / "fewer-blocks")
    text = [504, 2143, 282, 260, 6354, 314]
    theirs = load(model)
    theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[i] for i in done["layers"])
    for place, layer in enumerate(theirs.model.layers):
        layer.self_attn.layer_idx = place
    theirs.config.num_hidden_layers = len(done["layers"])
    if getattr(theirs.config, "layer_types", None):
        theirs.config.layer_types = [theirs.config.layer_types[i] for i in done["layers"]]
    ours = load(work / "fewer-blocks")
    apart = (logits(ours, text) - logits(theirs, text)).abs().max().item()
    assert apart == 0, f"the logits differ by {apart}"
    print(f"blocks {done['layers']} stay: transformers loads them, and has the same logits as with the others taken out")
    config = ours.config
    done = run("--num-key-value-heads", 2, "--intermediate-size", 1000, "--data", data, "--max-rows", 8,
               "-o", work / "narrower")
    narrow = load(work / "narrower")
    assert narrow.config.num_key_value_heads == 2 and narrow.config.intermediate_size == 1000
    loss = done["measured"]["loss"]
    assert torch.isfinite(logits(narrow, text)).all() and loss > 0
    print(f"2 of {config.num_key_value_heads} key and value heads and 1000 channels stay: transformers loads them; "
          f"the loss is {loss:.3f}, {done['measured']['loss_before']:.3f} before")


if len(sys.argv) == 2:
    fixtures(pathlib.Path(sys.argv[1]))
else:
    check(sys.argv[1], sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4]))
