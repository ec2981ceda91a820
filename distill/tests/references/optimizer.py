#!/usr/bin/env python3
"""Golden numbers of AdamW and of learning rate schedules, made with torch and transformers.

    python optimizer.py ../fixtures/optimizer.json

adamw      ten steps on a matrix (with weight decay) and a vector (without), with gradients that are written down too
adamw_8bit five steps of bitsandbytes' blockwise AdamW on two whole blocks and a short one: values, scales, weights
maps       what the 256 codes of a moment with and without sign stand for
schedules  the factor at every step, for some warm-ups and lengths
Seen with torch 2.15, transformers 5.23, bitsandbytes 0.50.2.
"""
import json
import sys

import bitsandbytes.functional as bnb
import torch
from transformers import get_scheduler

torch.set_num_threads(1)


def adamw():
    torch.manual_seed(5)
    matrix = torch.nn.Parameter(torch.randn(3, 4))
    vector = torch.nn.Parameter(torch.randn(5))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    flat = lambda tensor: tensor.detach().flatten().tolist()
    out = {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8,
           "start": [flat(matrix), flat(vector)], "steps": []}
    for step in range(10):
        # One gradient is far larger than the others, and one is zero.
        matrix.grad = torch.randn(3, 4) * (100.0 if step == 3 else 1.0)
        vector.grad = torch.randn(5) * (0.0 if step == 5 else 1e-4)
        gradients = [flat(matrix.grad), flat(vector.grad)]
        optimizer.step()
        state = [optimizer.state[p] for p in (matrix, vector)]
        out["steps"].append({"gradients": gradients, "weights": [flat(matrix), flat(vector)],
                             "exp_avg": [flat(s["exp_avg"]) for s in state],
                             "exp_avg_sq": [flat(s["exp_avg_sq"]) for s in state]})
    return out


def gradient_8bit(step, count=600):
    """Numbers of very different sizes that optimizer.rs can compute again, exact in f32."""
    return torch.tensor([((i * 37 + step * 101) % 257 - 128) / 128 * 2.0 ** -(i % 17) for i in range(count)])


def quantise(values, code):
    """Blocks of 256 with their largest magnitude as scale, and the code of the nearest value: what bitsandbytes' CUDA kernel
    and its default backend do. Its CPU kernel looks codes up in even steps, and finds others for small numbers."""
    scales = torch.tensor([block.abs().max() for block in values.split(256)])
    scaled = torch.cat([block * (1 / scale) for block, scale in zip(values.split(256), scales)])
    return (scaled.unsqueeze(-1) - code).abs().argmin(-1), scales


def dequantise(codes, scales, code):
    return code[codes] * scales.repeat_interleave(256)[:len(codes)]


def adamw_8bit():
    """bitsandbytes' `_optimizer_update_8bit_blockwise_cpu`, with the rounding above."""
    maps = [bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)]
    weights, states = torch.zeros(600), [(torch.zeros(600, dtype=torch.long), torch.zeros(3)) for _ in range(2)]
    lr, beta1, beta2, decay = 1e-2, 0.9, 0.95, 0.1
    for step in range(1, 6):
        gradient = gradient_8bit(step)
        mean, square = (dequantise(*state, code) for state, code in zip(states, maps))
        mean.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        weights.mul_(1.0 - lr * decay)
        weights.addcdiv_(mean, (square.sqrt() / (1.0 - beta2 ** step) ** 0.5).add_(1e-8), value=-lr / (1.0 - beta1 ** step))
        states = [quantise(values, code) for values, code in zip((mean, square), maps)]
    return {"lr": lr, "weight_decay": decay, "betas": [beta1, beta2], "eps": 1e-8, "steps": 5,
            "weights": weights.tolist(),
            "exp_avg": [maps[0][code].item() for code in states[0][0]],
            "exp_avg_sq": [maps[1][code].item() for code in states[1][0]],
            "absmax": [scales.tolist() for _, scales in states]}


def maps():
    return {"signed": bnb.create_dynamic_map(signed=True).tolist(),
            "unsigned": bnb.create_dynamic_map(signed=False).tolist()}


def schedules():
    out = []
    for name in ["linear", "cosine", "constant", "constant_with_warmup"]:
        for warmup, total in [(0, 5), (3, 11), (1, 1), (4, 4)]:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
            factors = []
            for _ in range(total):
                factors.append(scheduler.get_last_lr()[0])
                optimizer.step()
                scheduler.step()
            out.append({"name": name, "warmup": warmup, "total": total, "factors": factors})
    return out


with open(sys.argv[1], "w") as file:
    json.dump({"adamw": adamw(), "adamw_8bit": adamw_8bit(), "maps": maps(), "schedules": schedules()}, file, indent=1)
    file.write("\n")
