"""Rows that quantize later layers alone start there, from what an earlier row gave: the same figures, sooner."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import quant_utils as qu
from quant_utils import Setting
from simquant.memory import free_memory
from simquant.sites import attention_layers

SHARE = 0.25  # of the free memory, which the stored outputs of layers may take
TOKENS = 8  # on which a model shows whether its layers can be passed over


class StandIn(nn.Module):
    """Takes a layer's place in the decoder's list, and has its attributes. The layer itself stays hooked or compiled.

    output  what it gives instead of running the layer; None: it runs it, and this is then what came
    calls   how often it was called
    """

    def __init__(self, layer: nn.Module, output: Any = None):
        super().__init__()
        self.layer, self.output, self.calls, self.is_passed_over = layer, output, 0, output is not None
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer: decoders ask for some, such as attention_type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs) -> Any:
        """Return the layer's output, a tensor or a tuple."""
        self.calls += 1
        if not self.is_passed_over:
            self.output = self.layer(*args, **kwargs)
        return self.output


def decoder_list(model) -> nn.ModuleList | None:
    """Return the list in which all layers with attention stand; None if there is none."""
    attention = {module for _, module, _ in attention_layers(model)}
    lists = (each for each in model.get_decoder().modules() if isinstance(each, nn.ModuleList))
    return next((each for each in lists if attention <= set(each.modules())), None)


def tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors of a layer's output."""
    return [each for each in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(each)]


def evenly_spaced(starts: Sequence[int], share: float) -> list[int]:
    """Return that share of starts, rounded down, evenly spaced between the first layer and the last of starts."""
    count = int(min(1.0, share) * len(starts))
    return [starts[(number + 1) * (len(starts) + 1) // (count + 1) - 1] for number in range(count)]


def fitting(starts: Sequence[int], need: Mapping[torch.device, float]) -> list[int]:
    """Return those of starts whose outputs SHARE of the free memory holds, if all of them need so many bytes."""
    shares = (SHARE * free_memory(device) / need[device] for device in need if need[device])
    return evenly_spaced(starts, min(shares, default=1.0))


class Prefixes:
    """What earlier rows of a batch gave before the layers at which later rows start.

    layers  the list in which the model's layers stand
    index   {module: index of the first layer that holds it}
    starts  each row's first layer that it quantizes; len(layers) of the unquantized model
    useful  those of starts, sorted, at which an earlier row is still unquantized
    bytes   {device: bytes that the outputs before all of useful take for each token}
    ids     the batch, and of it: rows yet to come, by their start; those of useful whose outputs fit; {start: output}
    """

    def __init__(self, model, settings: Sequence[Setting]):
        layers = decoder_list(model)
        self.model, self.layers = model, nn.ModuleList() if layers is None else layers
        backwards = reversed(range(len(self.layers)))
        self.index = {module: index for index in backwards for module in self.layers[index].modules()}
        sites = {site for setting in settings for site in setting}
        self.starts = [self.start(each) for each in settings] if all(s.module in self.index for s in sites) else []
        reached = [max(self.starts[:row], default=0) for row in range(len(self.starts))]
        self.useful = sorted({start for start, most in zip(self.starts, reached, strict=True) if 0 < start <= most})
        self.bytes: dict[torch.device, float] = {}
        self.forget()

    def start(self, setting: Setting) -> int:
        """Return the index of the first layer that a setting quantizes."""
        return min((self.index[site.module] for site in setting), default=len(self.layers))

    def forget(self) -> None:
        """Free what is stored."""
        self.ids: Tensor | None = None
        self.to_come, self.chosen, self.outputs = list[int](), list[int](), dict[int, Any]()

    def passing_over(self, start: int, output: Any) -> dict[int, StandIn]:
        """Return what stands in for all layers before start, the last of which gave output."""
        return {index: StandIn(self.layers[index], output) for index in range(start)}

    def run_with(self, stand_ins: Mapping[int, StandIn], ids: Tensor) -> Any:
        """Return the body's output for ids [B,T], with stand-ins for some of the layers, by their index."""
        own = {index: self.layers[index] for index in stand_ins}
        try:
            for index, each in stand_ins.items():
                self.layers[index] = each
            return inspect.unwrap(qu.run_body)(self.model, ids, {})
        finally:
            for index, layer in own.items():
                self.layers[index] = layer

    @torch.inference_mode()
    def keep_what_is_exact(self) -> None:
        """Remove from useful each start from which the model does not give the same bits, tried on a few tokens.

        Some layers read more than the output of the layer before, such as the keys and values of an earlier one: no
        start may lie between the two. A pass over other tokens comes in between, so that what a layer still remembers
        of the first pass cannot make the bits the same.
        """
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        ids = (torch.arange(5, 5 + TOKENS, device=qu.input_device(self.model)) % vocabulary)[None]
        stored, exact = {index: StandIn(layer) for index, layer in enumerate(self.layers)}, list[int]()
        try:
            expected = self.run_with(stored, ids).last_hidden_state
            self.run_with({}, ids.flip(1))
        except Exception:  # whatever a model does with stand-ins
            self.useful = []
        is_loop = any(each.calls != 1 for each in stored.values())  # the first layers read what the last ones gave
        for start in [] if is_loop else reversed(self.useful):  # layers before it remember the other tokens
            with contextlib.suppress(Exception):
                given = self.run_with(self.passing_over(start, stored[start - 1].output), ids).last_hidden_state
                exact += [start] if torch.equal(given, expected) else []
        self.useful = exact[::-1]
        for each in (each for start in exact for each in tensors_in(stored[start - 1].output)):
            self.bytes[each.device] = self.bytes.get(each.device, 0.0) + each.nbytes / ids.numel()

    def nearest(self, start: int) -> int:
        """Return the greatest of chosen that is no later than start; 0 if there is none."""
        return max((each for each in self.chosen if each <= start), default=0)

    def run(self, model, ids: Tensor, setting: Setting) -> Any:
        """See quant_utils.run_body."""
        if ids is not self.ids or not self.to_come:
            self.ids, self.to_come, self.outputs = ids, list(self.starts), {}
            self.chosen = fitting(self.useful, {device: each * ids.numel() for device, each in self.bytes.items()})
        start = self.start(setting)
        self.to_come.remove(start)
        needed = {self.nearest(each) for each in self.to_come}
        begin = max((each for each in self.outputs if each <= start), default=0)
        storing = {each: StandIn(self.layers[each - 1]) for each in needed if begin < each <= start}
        stand_ins = self.passing_over(begin, self.outputs.get(begin)) | {at - 1: it for at, it in storing.items()}
        try:
            output = self.run_with(stand_ins, ids)
        except BaseException:
            self.forget()  # memory is short, maybe
            raise
        came = self.outputs | {at: each.output for at, each in storing.items()}
        self.outputs = {at: each for at, each in came.items() if at in needed}
        return output


def storage(shape, settings: Sequence[Setting], tokens: int, device: torch.device) -> tuple[int, int]:
    """Return (layers whose inputs would be stored on device, their bytes) for a window of so many tokens, at most."""
    useful = Prefixes(shape, settings).useful
    each = tokens * shape.config.get_text_config(decoder=True).hidden_size * shape.dtype.itemsize
    count = len(fitting(useful, {device: each * len(useful)}))
    return count, count * each


@contextmanager
def stored(model, settings: Sequence[Setting]) -> Iterator[None]:
    """Let rows of settings, measured in their order, start where they can inside the block, if that is exact."""
    prefixes = Prefixes(model, settings)
    if prefixes.useful:
        prefixes.keep_what_is_exact()
    if not prefixes.useful:
        yield
        return
    qu.FASTER["run_body"] = [(lambda other, *_: other is model, prefixes.run)]
    try:
        yield
    finally:
        qu.FASTER.pop("run_body", None)
        prefixes.forget()
