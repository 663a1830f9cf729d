"""KVQuant's own quantizer files: pickles, read by an unpickler that admits tensors and arrays of numbers alone."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_utils import Setting
from simquant.files import write_atomically


class RefusedPickle(pickle.UnpicklingError):
    """A pickle asks for something that is neither a tensor nor an array of plain numbers."""


class PickledDtype:
    """Stands in for numpy.dtype while a pickle is read: a code such as f4, and a byte order."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise RefusedPickle(f"it asks for an array of {code!r}, which is no plain number")
        self.code = code

    def __setstate__(self, state: tuple):
        self.code = {"<": "<", ">": ">"}.get(state[1], "") + self.code

    def array(self, content: bytes, shape: tuple = (), order: Any = "C") -> np.ndarray:
        """Return a new array of content's numbers."""
        numbers = np.frombuffer(content, np.dtype(self.code)).reshape(shape, order=order)
        return numbers.astype(numbers.dtype.newbyteorder("="))  # torch takes no other byte order


class PickledArray:
    """Stands in for an array that numpy's older protocols build up in two steps."""

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, content = state
        self.value = dtype.array(content, shape, "F" if is_fortran else "C")


class TensorUnpickler(pickle.Unpickler):
    """Reads pickles of torch tensors and numpy arrays in plain containers, and refuses to resolve any other name.

    No live object of a library is ever handed out: what a pickle may call are stand-ins made for that one call.
    """

    def find_class(self, module: str, name: str) -> Callable:
        """Return the stand-in for a name that pickles of tensors and arrays use."""
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        stand_ins: dict[str, Callable] = {
            "collections.OrderedDict": lambda: OrderedDict(),
            "torch._utils._rebuild_tensor_v2": lambda *parts: torch._utils._rebuild_tensor(*parts[:4]),
            "torch.storage._load_from_bytes": lambda content: torch.load(io.BytesIO(content), "cpu", weights_only=True),
            "numpy.ndarray": lambda: None,
            "numpy.dtype": lambda *parts: PickledDtype(*parts),
            "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(),
            "numpy._core.multiarray.scalar": lambda dtype, content: dtype.array(content),
            "numpy._core.numeric._frombuffer": lambda content, dtype, *how: dtype.array(bytes(content), *how),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, as protocol 2 writes them
        }
        if full not in stand_ins:
            raise RefusedPickle(f"it asks for {full[:80]}, which is neither a tensor nor an array")
        return stand_ins[full]


def plain(value: object) -> Tensor:
    """Return the tensor that a pickled tensor, array or number stands for."""
    return torch.as_tensor(value.value if isinstance(value, PickledArray) else value)


def read(path: str) -> dict[str, Any]:
    """Return a file as KVQuant's calibration writes it, in the form of quantizer_file.load.

    {"model.layers.I.self_attn.k_proj": (upper, lower[, [centroids][, normscale, normoffset]])}: upper and lower are
    [1,C] for keys; for values, whose range is dynamic, they are ignored. It names bits and codebook for NUQ only.
    """
    with open(path, "rb") as file:
        for opcode, number, _ in pickletools.genops(file):  # the unpickler makes room for as many objects
            if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(number, int) and number > os.path.getsize(path):
                raise RefusedPickle(f"it numbers an object {number}, and has no room for so many")
        file.seek(0)
        published = TensorUnpickler(file).load()
    quantizers: dict[str, dict] = {}
    widths, settings = {}, dict[str, Any]()
    for name, (upper, lower, *rest) in published.items():
        upper, lower = plain(upper).float(), plain(lower).float()
        widths[name] = upper.numel() if len(upper) == 1 else None
        parts: dict[str, Any] = {"lo": lower.flatten(), "hi": upper.flatten()}
        bits, settings = None, {"nuq": bool(rest), "norm": len(rest) == 3}
        if rest:
            parts["codebook"] = plain(rest[0][0]).float().flatten().sort().values
            bits = len(parts["codebook"]).bit_length() - 1
            settings["abits"] = [bits]
        if len(rest) == 3:
            parts |= {"scale": float(plain(rest[1])), "offset": float(plain(rest[2]))}
        quantizers[str(name)] = {bits: parts}
    return {"model": {"name": None, "type": None, "channels": widths}, "settings": settings, "quantizers": quantizers}


def export(path: str, setting: Setting) -> None:
    """Write scalar quantizers as read reads them, a plain pickle of tensors and arrays, atomically."""
    published = {}
    for site, q in setting.items():
        quantizer: Any = q
        anything = torch.ones(2, 1)  # [tokens,1] there, and ignored: the range is dynamic
        entry: tuple = (anything, -anything) if quantizer.lo is None else (quantizer.hi[None], quantizer.lo[None])
        is_normed = (quantizer.scale, quantizer.offset) != (1, 0)
        if quantizer.levels == "nuq" or is_normed:
            entry += ([quantizer.codebook[:, None].numpy()],)
        if is_normed:
            entry += tuple(torch.tensor(x, dtype=torch.float64) for x in (quantizer.scale, quantizer.offset))
        published[site.name] = entry
    write_atomically(path, lambda file: pickle.dump(published, file))
