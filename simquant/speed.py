"""What changes speed alone: faster definitions in place of the core's own, and compiled decoder layers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import quant_utils as qu
from quant_utils import UserError
from simquant import faster_cpu, faster_gpu
from simquant.notices import notify
from simquant.sites import attention_layers


def install() -> None:
    """Let faster definitions, which give the same bits, replace those of the core wherever they serve."""
    gpu, cpu = faster_gpu, faster_cpu
    qu.FASTER["order_statistics"] = [
        (gpu.is_counted, gpu.counted_tails),
        (cpu.is_to_turn, cpu.turned_order_statistics),
    ]
    qu.FASTER["inlier_bounds"] = [(gpu.is_counted, gpu.inlier_bounds), (cpu.is_on_cpu, cpu.inlier_bounds)]
    qu.FASTER["decode_nearest"] = [(gpu.is_compiled, gpu.decode_nearest)]
    qu.FASTER["sorted_rows"] = [(cpu.is_on_cpu, cpu.sorted_rows)]
    qu.FASTER["snap"] = [(cpu.has_finder, cpu.snap)]


class CompilationError(UserError):
    """The decoder layers do not compile."""


def is_to_compile(asked: str, device: torch.device) -> bool:
    """Return whether evaluations are compiled. The compiler is tried first, and may lack Triton, or a C compiler.

    If it fails, auto, which compiles on a GPU only, says so and goes without, and on is a UserError.
    """
    if asked == "off" or (asked == "auto" and device.type == "cpu"):
        return False
    try:
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # torch says nothing
            raise RuntimeError("TORCHDYNAMO_DISABLE is set")
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is missing
        reason = f"torch.compile fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if asked == "on":
            raise UserError(f"--compile on: {reason}: give --compile off") from error
        notify(f"--compile auto: off, because {reason}")
        return False
    return True


def decoder_layers(model) -> list[nn.Module]:
    """Return the modules that hold one attention layer each, one below the list that they stand in."""
    attention = {module for _, module, _ in attention_layers(model)}
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return [layer for each in lists for layer in each if attention & set(layer.modules())]


@contextmanager
def compiled(model, enabled: bool = True) -> Iterator[None]:
    """Run every decoder layer as one compiled graph, hooks included, which alike layers share, inside the block."""
    if not enabled:
        yield
        return
    layers = decoder_layers(model)
    # Triton's own division is approximate, and kernels chosen by timing round as they please (as far as torch knows)
    exact = [name for name in torch._inductor.list_options() if re.search("divi[a-z]*_rounding|^deterministic$", name)]
    # without guards on hooks a layer that was compiled without them would pass them over
    options: dict[str, Any] = {"skip_nnmodule_hook_guards": False, "fail_on_recompile_limit_hit": True}
    options |= {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}  # widths, parts and batch sizes
    with torch._dynamo.config.patch(options):
        try:
            for layer in layers:
                layer.compile(dynamic=False, options=dict.fromkeys(exact, True))
            yield
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CompilationError(f"the decoder layers do not compile ({reason}): give --compile off") from error
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
