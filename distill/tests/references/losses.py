#!/usr/bin/env python3
"""Distillation losses and their gradients, by torch and by TRL's own generalized_jsd_loss.

usage: losses.py FIXTURES_DIR      writes FIXTURES_DIR/losses.safetensors

Everything is in f64, over logits that are f32. A loss is a sum over rows. `NAME` is its value, `NAME.grad` its gradient
by the student's logits.
"""
import pathlib
import sys

import torch
from safetensors.torch import save_file
from torch.nn.functional import log_softmax
from trl.experimental.gkd.gkd_trainer import GKDTrainer

torch.set_num_threads(1)
torch.manual_seed(7)
ROWS, VOCABULARY, K = 5, 61, 8
student = (3 * torch.randn(ROWS, VOCABULARY)).float()
teacher = (student + 2 * torch.randn(ROWS, VOCABULARY)).float()
teacher[0, 3] += 25  # a teacher that is certain
student[1, 4] -= 40  # a student that finds a token impossible
student[2] = teacher[2]
labels = torch.tensor([3, 4, 0, 60, 17])
fixture = {"student": student, "teacher": teacher, "labels": labels}


def put(name, loss):
    logits = student.double().clone().requires_grad_()
    value = loss(logits, teacher.double())
    value.backward()
    fixture[name], fixture[f"{name}.grad"] = value.detach(), logits.grad


def jsd(beta, temperature):
    # Its reduction "sum" adds up rows and tokens.
    return lambda s, t: GKDTrainer.generalized_jsd_loss(
        s[None], t[None], beta=beta, temperature=temperature, reduction="sum")


def kl(p, q):
    """KL of log-probabilities."""
    return (p.exp() * (p - q)).sum()


def mixture(share, p, q):
    return torch.log(share * p.exp() + (1 - share) * q.exp())


def logs(s, t, temperature=1.0):
    return log_softmax(t / temperature, -1), log_softmax(s / temperature, -1)


def skew_forward(alpha):
    return lambda s, t: (lambda p, q: kl(p, mixture(alpha, p, q)))(*logs(s, t))


def skew_reverse(alpha):
    return lambda s, t: (lambda p, q: kl(q, mixture(1 - alpha, p, q)))(*logs(s, t))


def total_variation(s, t):
    p, q = logs(s, t)
    return 0.5 * (p.exp() - q.exp()).abs().sum()


def with_tail(x, ids):
    """log-probabilities of the tokens of ids and of all others together."""
    others = x.scatter(-1, ids, float("-inf"))
    return torch.cat([x.gather(-1, ids), others.logsumexp(-1, keepdim=True)], -1)


def top(divergence, temperature):
    def loss(s, t):
        p, q = logs(s, t, temperature)
        ids = p.topk(K, -1).indices
        return divergence(with_tail(p, ids), with_tail(q, ids))

    return loss


for temperature in [0.7, 1.0, 2.0]:
    for beta in [0.0, 0.1, 0.5, 0.9, 1.0]:
        put(f"trl.{beta}.{temperature}", jsd(beta, temperature))
    put(f"top.forward.{temperature}", top(kl, temperature))
    put(f"top.reverse.{temperature}", top(lambda p, q: kl(q, p), temperature))
for alpha in [0.1, 0.5]:
    put(f"skew_forward.{alpha}", skew_forward(alpha))
    put(f"skew_reverse.{alpha}", skew_reverse(alpha))
put("total_variation", total_variation)
put("cross_entropy", lambda s, t: torch.nn.functional.cross_entropy(s, labels, reduction="sum"))
ids = log_softmax(teacher.double(), -1).topk(K, -1).indices
fixture["top.ids"] = ids
fixture["top.logprobs"] = log_softmax(teacher.double(), -1).gather(-1, ids)
save_file({k: v.contiguous() for k, v in fixture.items()}, pathlib.Path(sys.argv[1]) / "losses.safetensors")
