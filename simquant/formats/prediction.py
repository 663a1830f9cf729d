"""Prediction (AQUA-KV, arXiv:2501.19392): only what other caches do not tell of a token is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from quant_utils import WINDOWS, Quantized, Quantizer, Setting, UserError

RIDGE = 1e-3  # of the regression, as a share of the mean square of a source's channels
MOST_CHANNELS = 2**14
# {name: {part: (how many layers below, part) of what it is predicted from}}
SOURCES: dict[str, dict[str, tuple[tuple[int, str], ...]]] = {
    "all": {"keys": ((1, "keys"), (1, "values")), "values": ((0, "keys"), (1, "keys"), (1, "values"))},
    "aqua": {"keys": ((1, "keys"),), "values": ((0, "keys"), (1, "values"))},
}
FIRST_ALONE = {"aqua"}  # rows in which the first layer is not predicted at all, its values from its own keys neither


@dataclass(frozen=True, eq=False)
class PredictedQuantizer(Quantizer):
    """A format of whole tokens that may code what is left of them after a linear prediction. A subclass has the code.

    bits     that an entry takes on average, any number in (0, 8]
    sinks    leading tokens that stay exact
    recent   tokens of the residual window (see Quantizer)
    window   its rule, one of WINDOWS
    predict  a row of SOURCES: which caches it is predicted from; None for none
    sources  those of them that the setting quantizes (see Quantizer)
    weight   fp16 [C'+1,C] of the prediction: a row for each channel of the sources, and the bias
    """

    bits: float = 2
    sinks: int = 0
    recent: int = 0
    window: str = "last"
    predict: str | None = None
    sources: tuple[tuple[int, str], ...] = ()
    weight: Tensor | None = None

    def __post_init__(self):
        is_count = all(type(each) is int and each >= 0 for each in (self.sinks, self.recent))
        if type(self.bits) not in (int, float) or not 0 < self.bits <= 8 or not is_count or self.window not in WINDOWS:
            raise UserError(f"no {self.bits} bits with {self.sinks} sinks, {self.recent} recent tokens")
        if self.predict not in (None, *SOURCES):
            raise UserError(f"there is no prediction {str(self.predict)[:40]!r}: {' or '.join(SOURCES)}")
        if self.weight is not None and not is_matrix(self.weight):
            raise UserError("its prediction is no matrix of numbers in fp16")

    def fit_code(self, x: Tensor, grad: Tensor | None) -> Self:
        """Return a copy whose code is fitted to x [N,T,C], which is fp32 and has no sinks, and the gradient there."""
        raise NotImplementedError

    def coded(self, x: Tensor) -> Tensor:
        """Return x [B,T,C] fp32 as it is decoded."""
        return self.coded_in(x, torch.float32)

    def coded_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the same where matrices are multiplied in dtype. Formats with large ones differ."""
        return self.coded(x)

    def fit(self, x: Tensor, grad: Tensor | None, others: Sequence[Tensor] = ()) -> Self:
        """See Quantizer. The prediction is a ridge regression on the sources; the code is fitted to the residual."""
        x, *others = (self.behind_sinks(each) for each in (x, *others))
        weight = regression(x, others) if others else None
        fitted = replace(self, weight=weight)
        grad = None if grad is None else self.behind_sinks(grad)
        return fitted.fit_code(x.float() - fitted.predicted(others, product_dtype(x)), grad)

    def behind_sinks(self, x: Tensor) -> Tensor:
        """Return x [B,T,C] without its sinks; x itself if there are none."""
        return x[:, self.sinks :] if self.sinks else x

    def predicted(self, others: Sequence[Tensor], dtype: torch.dtype) -> Tensor | float:
        """Return [B,T,C] fp32 that others [B,T,C'] predict, multiplied in dtype; 0 if there are none."""
        if (len(others) > 0) != (self.weight is not None):
            raise UserError("its prediction, or what it would be predicted from, is missing")
        if self.weight is None:
            return 0.0
        return product(torch.cat([*others], -1), self.weight[:-1], dtype) + self.weight[-1]

    def quantize(self, x: Tensor, others: Sequence[Tensor] = ()) -> Quantized:
        """See Quantizer. The result is rounded to x's own dtype."""
        body = self.behind_sinks(x).float()
        if body.numel() == 0:
            return Quantized(x)
        dtype = product_dtype(x)
        predicted = self.predicted([self.behind_sinks(each) for each in others], dtype)
        values = self.coded_in(body - predicted, dtype) + predicted
        return Quantized(torch.cat([x[:, : self.sinks], values.to(x.dtype)], 1))

    @property
    def entry_bits(self) -> float:
        """Bits that an entry of a quantized token takes."""
        raise NotImplementedError

    def cost(self, tokens: int, channels: int) -> float:
        """See Quantizer. A token that stays exact takes 16 bits an entry."""
        quantized = self.quantized_tokens(tokens)
        return channels * (16 * (tokens - quantized) + self.entry_bits * quantized)

    @property
    def extras(self) -> list[str]:
        """What __str__ says of every such format: the prediction, and the tokens that stay exact."""
        return [*(["predicted from the layer below"] if self.predict else []), *self.exact_tokens]


def is_matrix(value: Any) -> bool:
    """Return whether value is a plain fp16 matrix of finite numbers, at most MOST_CHANNELS * 4 by MOST_CHANNELS."""
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
    is_plain = is_plain and value.dtype == torch.float16 and value.ndim == 2
    is_plain = is_plain and len(value) <= 4 * MOST_CHANNELS and value.shape[1] <= MOST_CHANNELS
    return is_plain and bool(value.isfinite().all())


def product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one [...,n] @ other [n,m] in fp32, from numbers rounded to dtype, or clipped to what it can hold."""
    if dtype == torch.float16:
        one = one.clamp(-65504, 65504)
    return (one.to(dtype) @ other.to(dtype)).float()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return in which dtype matrices multiply what is as x: fp16 for the 16-bit activations of a GPU, else fp32."""
    return torch.float16 if x.is_cuda and x.dtype.itemsize == 2 else torch.float32


def regression(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return fp16 [C'+1,C]: the ridge regression of x [N,T,C] on others [N,T,C'], by fp64 sums of windows' products."""
    size = 1 + sum(each.shape[-1] for each in others)
    gram, moment = (torch.zeros(size, n, dtype=torch.float64, device=x.device) for n in (size, x.shape[-1]))
    for target, *inputs in zip(x, *others, strict=True):
        rows = torch.cat([*inputs, torch.ones_like(target[:, :1])], -1).float()
        gram += rows.T @ rows
        moment += rows.T @ target.float()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.cholesky_solve(moment, torch.linalg.cholesky(gram)).clamp(-6e4, 6e4).half().contiguous()


def with_sources(setting: Setting) -> Setting:
    """Return setting with the sources of all that is to be predicted; the layer below is the next quantized one."""
    layers = sorted({site.layer for site in setting})
    keys = {site.key for site in setting}
    linked = dict(setting)
    for site, each in setting.items():
        if isinstance(each, PredictedQuantizer) and each.predict is not None:
            at = layers.index(site.layer)
            asked = SOURCES[each.predict][site.part] if at or each.predict not in FIRST_ALONE else ()
            wanted = [(layers[at - down], part) for down, part in asked if at >= down]
            linked[site] = replace(each, sources=tuple(source for source in wanted if source in keys))
    return linked
