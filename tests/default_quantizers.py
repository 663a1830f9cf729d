"""The matrix: every method of the table, per channel and per token, with each option that goes with it, not fitted.

A row of METHODS is in it by itself, and tests/test_quantizers.py takes every row of it through every test.
"""

import itertools
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple

import torch

from quant_utils import UserError
from simquant.methods import METHODS
from simquant.plans import Plan

DATA_FREE = {
    "plain": {},
    "sinks": {"sinks": 2},
    "outliers": {"outliers": 0.1},
    "outliers, sinks": {"outliers": 0.1, "sinks": 1},
}
CALIBRATED = {
    "cap": {"outliers": 0.2, "cap": 0.1},
    "integer zero": {"integer_zero": True},
    "q-norm": {"q_norm": True, "outliers": 0.05},
    "fisher": {"fisher": "paper"},
    "fisher as the code": {"fisher": "code", "outliers": 0.05, "sinks": 1},
}
OPTIONS = DATA_FREE | CALIBRATED
CHANNELS = 64  # which blocks and groups divide
WIDTHS = (4, 3, 2, 8, 6, 5, 7)  # a row takes the first that its format has


class Case(NamedTuple):
    """What a row of the matrix is called."""

    method: str
    axis: str
    options: str  # a name in DATA_FREE or CALIBRATED
    is_fitted: bool = False

    def __str__(self):
        return f"{self.method} per {self.axis}, {self.options}{', fitted' * self.is_fitted}"


def matrix():
    """Return {case: quantizer} as the scripts make them, each once, without options that a method does not take."""
    rows, seen = {}, set()
    for method, axis, label in itertools.product(METHODS, ("channel", "token"), OPTIONS):
        flags = {f"--{name}": (name, value) for name, value in OPTIONS[label].items()}
        plan = Plan(method, [], {"keys": axis}, flags)
        if "--fisher" in flags and not METHODS[method].calibrated:
            continue  # there is nothing that gradients could weigh
        for bits in WIDTHS:
            with suppress(UserError):
                quantizer = plan.quantizer("keys", bits)
                rows |= {Case(method, axis, label): quantizer} if str((method, vars(quantizer))) not in seen else {}
                seen.add(str((method, vars(quantizer))))
                break
    return rows


def taps_for(quantizer, x):
    """Return taps that hold, for every source of a quantizer, something that resembles x [B,T,C]."""
    return {source: SimpleNamespace(values=0.9 * x + 0.1 * x.roll(1, -1)) for source in quantizer.sources}


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
    return quantizer.fit(x, grad if quantizer.needs_gradient else None, taps_for(quantizer, x))


MATRIX = matrix()
VARIANTS = {  # fitted, and as the data-free script uses it
    **{case._replace(is_fitted=True): fitted(quantizer) for case, quantizer in MATRIX.items()},
    **{c: q for c, q in MATRIX.items() if c.options in DATA_FREE and not METHODS[c.method].calibrated},
}
