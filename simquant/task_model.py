"""A quantized model as lm-evaluation-harness asks it. Importing this needs the package lm_eval."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from quant_utils import input_device


class SequenceModel(HFLM):
    """A loaded model that computes every sequence alone, as a whole and without a cache.

    Alone, because a range of the whole window would see the padding of a batch. As a whole while it generates, too:
    the hooks see all tokens at every step. Where no quantizer sees later tokens that is what decoding token by token
    gives, with sinks and residual windows. Log-likelihoods are taken in fp32.

    The harness tells its cache of answers each of them: here that calls `answered`, and nothing is stored.
    """

    def __init__(self, model: Any, tokenizer: Any, answered: Callable[[], object]):
        own = copy.deepcopy(tokenizer)  # the harness may give it a token for padding
        super().__init__(pretrained=model, tokenizer=own, batch_size=1, softmax_dtype="float32")
        self._device = input_device(model)
        self.answered = answered
        self.set_cache_hook(self)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Count a request as answered."""
        self.answered()

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Return logits [1,T,V] of a sequence [1,T]; the others are for encoder-decoder models."""
        with torch.inference_mode():
            return self.model(input_ids=inps, use_cache=False).logits.to(inps.device)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Return [1,T'] the context [1,T] and what follows, as the harness does, but without a cache."""
        generate = self.model.generate
        self.model.generate = lambda **asked: generate(**{**asked, "use_cache": False})
        try:
            return super()._model_generate(context, max_length, stop, **options)
        finally:
            del self.model.generate
