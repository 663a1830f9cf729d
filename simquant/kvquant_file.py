"""Pickles of tensors and plain values, read with nothing in them executed, and KVQuant's own quantizer files."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_utils import Setting
from simquant.files import write_atomically

MOST_STEPS, MOST_DEPTH, MOST_SITES, MOST_CHANNELS, MOST_LEVELS = 2**20, 12, 2**14, 2**20, 256
OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINBYTES
SHORT_BINUNICODE SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE"""


class RefusedPickle(pickle.UnpicklingError):
    """A pickle asks for something that is neither a tensor nor an array of plain numbers, or for too much."""


class Steps(dict[int, Callable]):
    """What each admitted opcode does, by its code, for as many steps as a quantizer file may take."""

    left = MOST_STEPS

    def __getitem__(self, code: int) -> Callable:
        self.left -= 1
        if code not in self or self.left < 0:
            raise RefusedPickle("it has too many values, or an opcode that makes none")
        return super().__getitem__(code)


class Memo(dict[int, Any]):
    """What a pickle may take again: what is small. So all that is read is about as large as the file."""

    def __getitem__(self, number: int) -> Any:
        value = super().__getitem__(number)
        if not is_small(value):
            raise RefusedPickle("it holds a list, a dictionary or something large twice")
        return value


def is_small(value: Any, depth: int = 2) -> bool:
    """Return whether value is a text, array or other leaf of at most MOST_LEVELS entries, or a tuple of few such."""
    if type(value) is tuple:
        return depth > 0 and len(value) <= 4 and all(is_small(each, depth - 1) for each in value)
    value = value.value if type(value) is PickledArray else value
    size = len(value) if type(value) in (str, bytes) else math.prod(getattr(value, "shape", ()))
    return type(value) not in (list, dict) and size <= MOST_LEVELS


class PlainUnpickler(pickle._Unpickler):
    """Reads a pickle of plain values, and of what is made of them by the stand-ins that `names` has for its names.

    No live object of a library is ever handed out. storage(dtype, key, numel) gives what torch.save stored apart.
    """

    def __init__(self, file: io.BytesIO, names: Mapping[str, Any], storage: Callable | None = None):
        super().__init__(file)
        codes = [getattr(pickle, name)[0] for name in OPCODES.split()]
        steps: dict[int, Any] = {code: self.dispatch[code] for code in codes}
        steps[pickle.SETITEM[0]] = lambda this: put(this, [this.stack.pop(-2), this.stack.pop()])
        steps[pickle.SETITEMS[0]] = lambda this: put(this, this.pop_mark())
        steps[pickle.BUILD[0]] = lambda this: this.stack[-2].take_state(*this.stack.pop())
        steps[pickle.BYTEARRAY8[0]] = steps[pickle.BINBYTES8[0]]  # else it makes room for as many as the file says
        self.dispatch = Steps(steps)  # type: ignore[misc]
        self.memo, self.names, self.storage = Memo(), names, storage

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name."""
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if full not in self.names:
            raise RefusedPickle(f"it asks for {full[:80]!r}, which is neither a tensor nor an array")
        return self.names[full]

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that torch.save calls ("storage", its type, its key, its device, its length)."""
        kind, dtype, key, _, numel, *_ = pid
        if self.storage is None or kind != "storage" or type(key) is not str or type(numel) is not int:
            raise RefusedPickle("it refers to something that is no storage of a tensor")
        return self.storage(dtype, key, numel)

    def load(self) -> Any:
        """Return the pickle's content: values of admitted types, nested at most MOST_DEPTH deep."""
        level = [whole := super().load()]
        for _ in range(MOST_DEPTH):
            if any(type(each) not in ADMITTED for each in level):
                raise RefusedPickle("it holds something that is no plain value")
            nested = [each for each in level if type(each) in (list, tuple, dict)]
            level = [part for each in nested for part in (each.values() if type(each) is dict else each)]
        if level:
            raise RefusedPickle("it is nested too deeply")
        return whole


def put(unpickler: Any, items: list) -> None:
    """Put keys and values, which alternate, into the dictionary read last. Only plain keys are quick to hash."""
    whole, keys = unpickler.stack[-1], items[::2]
    if type(whole) is not dict or any(type(key) not in (str, int, float, NoneType) for key in keys):
        raise RefusedPickle("it has a dictionary whose keys are neither names nor numbers")
    whole.update(zip(keys, items[1::2], strict=True))


class PickledDtype:
    """Stands in for numpy.dtype while a pickle is read: a code such as f4, and a byte order."""

    def __init__(self, code: str, *_):
        if type(code) is not str or not re.fullmatch(r"[fiu][1248]|b1", code):
            raise RefusedPickle(f"it asks for an array of {str(code)[:20]!r}, which is no plain number")
        self.code = code

    def take_state(self, version: int, order: str, *_) -> None:
        """Take the byte order."""
        self.code = {"<": "<", ">": ">"}.get(order, "") + self.code


class PickledArray:
    """Stands in for an array that numpy's older protocols build up in two steps."""

    value: np.ndarray | None = None

    def take_state(self, version: int, shape: tuple, dtype: PickledDtype, is_fortran: bool, content: bytes) -> None:
        """Take the numbers."""
        self.value = array(content, dtype, shape)


def array(content: bytes, dtype: PickledDtype, shape: tuple = (), *_) -> np.ndarray:
    """Return content's numbers as a view. Rows or columns first is no matter: all that is used has one dimension."""
    return np.frombuffer(content, np.dtype(dtype.code)).reshape(shape)


ADMITTED = (NoneType, bool, int, float, str, bytes, list, tuple, dict, Tensor, np.ndarray, PickledArray)


def rebuilt(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """Return a tensor of a storage [N]. Its entries are all there: none stands for many."""
    is_plain = type(storage) is Tensor and all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride))
    if not is_plain or len(size) > 4 or math.prod(size) > storage.numel():
        raise RefusedPickle("it has a tensor with more entries than are stored")
    return storage.as_strided(size, stride, offset)


TORCH: dict[str, Any] = {  # what torch.save writes
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": rebuilt,
}
for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Bool"):
    TORCH[f"torch.{kind}Storage"] = getattr(torch, kind.lower())


def loose_storage(content: bytes) -> Tensor:
    """Return the storage [N] that torch.save wrote without an archive: five pickles, its length, its numbers."""
    file, blank = io.BytesIO(content), partial(torch.empty, device="meta")  # it takes no memory
    readers = (PlainUnpickler(file, TORCH, lambda dtype, _, numel: blank(numel, dtype=dtype)) for _ in range(5))
    *_, described, _ = (reader.load() for reader in readers)
    stored = bytearray(memoryview(content)[file.tell() + 8 :])
    return torch.frombuffer(stored, dtype=described.dtype)[: len(described)]


PUBLISHED: dict[str, Any] = TORCH | {  # what KVQuant's calibration writes: torch tensors and numpy arrays
    "torch.storage._load_from_bytes": loose_storage,
    "numpy.ndarray": None,
    "numpy.dtype": PickledDtype,
    "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(),
    "numpy._core.multiarray.scalar": lambda dtype, content: array(content, dtype),
    "numpy._core.numeric._frombuffer": array,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, as protocol 2 writes them
}


def array_of(value: Any) -> Any:
    """Return the tensor or array that a pickle holds; RefusedPickle for anything else."""
    value = value.value if type(value) is PickledArray else value
    if type(value) not in (Tensor, np.ndarray):
        raise RefusedPickle("it has something else in place of a tensor or an array")
    return value


def numbers(value: Any, most: int) -> Tensor:
    """Return [N] what a pickled tensor, array or number holds, of at most so many entries."""
    values: Any = np.float64(value).reshape(1) if type(value) in (int, float) else array_of(value)
    if math.prod(values.shape) > most:
        raise RefusedPickle(f"it has {math.prod(values.shape)} entries where at most {most} can be")
    if type(values) is np.ndarray:  # torch takes no other byte order
        values = torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    return values.flatten()


def parts_of(upper: Any, lower: Any, codebook: Any = None, scale: Any = 1.0, offset: Any = 0.0) -> dict[str, Any]:
    """Return what an entry holds, in the fields' names. A range that is not [1,C] is one of tokens, and not used."""
    parts: dict[str, Any] = {}
    if array_of(upper).ndim == 2 and len(array_of(upper)) == 1:
        parts |= {"lo": numbers(lower, MOST_CHANNELS).float(), "hi": numbers(upper, MOST_CHANNELS).float()}
    if codebook is not None:
        parts["codebook"] = numbers(codebook[0], MOST_LEVELS).float().sort().values
        parts |= {"scale": numbers(scale, 1).item(), "offset": numbers(offset, 1).item()}
    return parts


def read(content: bytes) -> dict[str, Any]:
    """Return a file as KVQuant's calibration writes it, in the form of quantizer_file.load.

    {"model.layers.I.self_attn.k_proj": (upper, lower[, [centroids][, normscale, normoffset]])}: upper and lower are
    [1,C] for keys; for values, whose range is dynamic, they are ignored. It names bits and codebook for NUQ only.
    """
    published = PlainUnpickler(io.BytesIO(content), PUBLISHED).load()
    if type(published) is not dict or len(published) > MOST_SITES:
        raise RefusedPickle("it is no dictionary of projections")
    quantizers: dict[str, dict] = {}
    widths, settings = {}, dict[str, Any]()
    for name, entry in published.items():
        if type(entry) is not tuple or len(entry) not in (2, 3, 5):
            raise RefusedPickle(f"its {str(name)[:80]!r} is no tuple of 2, 3 or 5 parts")
        parts = parts_of(*entry)
        widths[name] = len(parts["hi"]) if "hi" in parts else None
        bits, settings = None, {"nuq": len(entry) > 2, "norm": len(entry) == 5}
        if len(entry) > 2:
            bits = len(parts["codebook"]).bit_length() - 1
            settings["abits"] = [bits]
        quantizers[name] = {bits: parts}
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
