#!/usr/bin/env python3
"""Golden numbers of AdamW and of learning rate schedules, made with torch and transformers.

    python optimizer.py ../fixtures/optimizer.json

adamw      ten steps on a matrix (with weight decay) and a vector (without), with gradients that are written down too
schedules  the factor at every step, for some warm-ups and lengths
Seen with torch 2.15, transformers 5.23.
"""
import json
import sys

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
    json.dump({"adamw": adamw(), "schedules": schedules()}, file, indent=1)
    file.write("\n")
