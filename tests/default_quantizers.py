"""The matrix: every method of the table, for keys and for values, with each option that goes with it, not fitted.

A row of METHODS is in it by itself, and tests/test_quantizers.py takes every row of it through every test.
"""

import itertools
from contextlib import suppress
from dataclasses import fields
from typing import NamedTuple

import torch

from quant_utils import UserError
from simquant import quantizer_file
from simquant.methods import METHODS
from simquant.plans import Plan

DATA_FREE = {
    "plain": {},
    "sinks": {"sinks": 2},
    "outliers": {"outliers": 0.1},
    "outliers, sinks": {"outliers": 0.1, "sinks": 1},
    "window": {"recent": 4},
    "clipped": {"counts_clipped": True},
}
CALIBRATED = {
    "cap": {"outliers": 0.2, "cap": 0.1},
    "integer zero": {"integer_zero": True},
    "q-norm": {"q_norm": True, "outliers": 0.05},
    "fisher": {"fisher": "paper"},
    "fisher as the code": {"fisher": "code", "outliers": 0.05, "sinks": 1},
}
OPTIONS = DATA_FREE | CALIBRATED
CHANNELS, HEAD = 64, 32  # which blocks and groups divide
WIDTHS = (4, 3, 2, 8, 6, 5, 7)  # a row takes the first that its format has


class Case(NamedTuple):
    """What a row of the matrix is called."""

    method: str
    kind: str  # keys or values, or how a scalar quantizer shares ranges
    options: str  # a name in DATA_FREE or CALIBRATED
    is_fitted: bool = False

    def __str__(self):
        return f"{self.method} {self.kind}, {self.options}{', fitted' * self.is_fitted}"


def matrix():
    """Return {case: quantizer} as the scripts make them, each once, without options that a method does not take."""
    rows, seen = {}, set()
    for method, label in itertools.product(METHODS, OPTIONS):
        if "fisher" in OPTIONS[label] and not METHODS[method].calibrated:
            continue  # there is nothing that gradients could weigh
        flags = {f"--{name}": (name, value) for name, value in OPTIONS[label].items()}
        for part, axis in (("keys", "channel"), ("keys", "token"), ("values", "token")):
            format = METHODS[method].format(part)
            taken = {each.name for each in fields(format.cls())}
            if not {*OPTIONS[label]} <= taken:
                continue
            plan, kind = Plan([], [], {part: axis}, flags, is_calibrated=METHODS[method].calibrated), part
            kind = f"per {axis}" if "axis" in taken and "axis" not in format.options else part
            for bits in (format.options["bits"],) if "bits" in format.options else WIDTHS:
                with suppress(UserError):
                    quantizer = plan.quantizer(method, part, bits, HEAD)
                    if (name := str((method, quantizer_file.state_of(quantizer)))) not in seen:
                        rows[Case(method, kind, label)] = quantizer
                    seen.add(name)
                    break
    return rows


def others_for(quantizer, x):
    """Return what every source of a quantizer may have given back: something that resembles x [B,T,C]."""
    return [0.9 * x + 0.1 * x.roll(1, -1) for _ in quantizer.sources]


def activations(windows, tokens=40, channels=CHANNELS, seed=0):
    """Return [N,T,C] of channels that differ in place and spread, with some entries far outside."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, tokens, channels, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, 6 * x, x)
    return x * torch.linspace(0.2, 3, channels) + torch.linspace(-1, 1, channels)


def fitted(quantizer, x=None):
    """Return a quantizer fitted to activations [N,T,C] and a gradient of any size there."""
    x = activations(3) if x is None else x
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) ** 3
    return quantizer.fit(x, grad if quantizer.needs_gradient else None, others_for(quantizer, x))


MATRIX = matrix()
VARIANTS = {  # fitted, and as the data-free script uses it
    **{case._replace(is_fitted=True): fitted(quantizer) for case, quantizer in MATRIX.items()},
    **{c: q for c, q in MATRIX.items() if c.options in DATA_FREE and not METHODS[c.method].calibrated},
}
