"""The quantizer file: fitted quantizers as plain values and tensors, and what they were made for."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import stat
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from quant_utils import Quantizer, Setting, Site, UserError
from simquant import formats, kvquant_file
from simquant.files import write_atomically

FORMAT, VERSION = "kvquant simulation: calibrated quantizers", 3
MOST_BYTES, MOST_MEMBERS = 2**34, 2**16


def state_of(quantizer: Quantizer) -> dict[str, Any]:
    """Return a quantizer as its class and its fields."""
    this: Any = quantizer
    held = {each.name: getattr(this, each.name) for each in fields(this) if each.init}
    plain = {name: state_of(value) if isinstance(value, Quantizer) else value for name, value in held.items()}
    return {"class": type(quantizer).__name__, **plain}


def made_of(state: Mapping[str, Any]) -> Quantizer:
    """Return the quantizer that state_of made state of; its constructor checks the fields."""
    for module in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}."):
        importlib.import_module(module.name)
    classes = {each.__name__: each for each in subclasses(Quantizer)}
    if (name := state["class"]) not in classes:
        raise UserError(f"it is for the format {str(name)[:40]!r}, which this program lacks")
    parts = {n: made_of(value) if isinstance(value, dict) else value for n, value in state.items() if n != "class"}
    return classes[name](**parts)


def subclasses(cls: Any) -> list[Any]:
    """Return all classes that derive from cls."""
    return [each for child in cls.__subclasses__() for each in (child, *subclasses(child))]


def save(path: str, settings: Mapping[Any, Setting], about: Mapping[str, Any]) -> None:
    """Write the quantizers of fitted settings, and about: the model, the flags, the versions.

    {"quantizers": {site's name: {bits: state_of}}}: keys and values of any two widths can be joined. Where sites share
    their bits they cannot, and the key is the label of their row's width.
    """
    quantizers: dict[str, dict] = {}
    for row, setting in settings.items():
        for site, quantizer in setting.items():
            quantizers.setdefault(site.name, {})[width_in_file(row, quantizer)] = state_of(quantizer)
    content = io.BytesIO()
    torch.save({"format": FORMAT, "format_version": VERSION, **about, "quantizers": quantizers}, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def width_in_file(row: Any, quantizer: Quantizer) -> Any:
    """Return what a file calls a quantizer of a row: its bits; where sites share bits, the label of the row."""
    return row.abits if quantizer.shares_bits else quantizer.bits


def load(path: str) -> dict[str, Any]:
    """Return what save wrote, or the same made of a file of version 2 or of KVQuant's own.

    Raises UserError for a file that is damaged, of a later version, or holds anything but data.
    """
    content = content_of(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = read_ours(content) if content.startswith(b"PK") else kvquant_file.read(content)
        check_contents(data)
    except Exception as error:  # a damaged archive or pickle can raise anything
        is_told = isinstance(error, (UserError, kvquant_file.RefusedPickle))
        told = str(error) if is_told else "it takes more memory than there is" if isinstance(error, MemoryError) else ""
        reason = f" ({' '.join(told.split())})" if told else ""
        advice = "calibrate again, or get it again"
        raise UserError(f"quantizer file {path!r} is damaged, or holds more than data{reason}: {advice}") from error
    return {**data, "path": path}


def content_of(path: str) -> bytes:
    """Return the bytes of a file. UserError for what cannot be read, or is far too large for a quantizer file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            reason = "it is not a regular file"
        elif status.st_size > MOST_BYTES:
            reason = f"it has {status.st_size} bytes, and a quantizer file at most {MOST_BYTES}"
        else:
            return Path(path).read_bytes()
    except OSError as error:
        reason = str(error.strerror)
    raise UserError(f"quantizer file {path!r} cannot be read ({reason}): give one that --calibrate made")


def check_contents(data: Mapping[str, Any]) -> None:
    """Raise UserError unless flags, model and names are of the types that they should be; KeyError if they lack."""
    about, values = data["model"], [each if isinstance(each, list) else [each] for each in data["settings"].values()]
    is_plain = lambda each: type(each) in (bool, int, float, NoneType) or is_name(each)  # noqa: E731
    sound = {
        "settings": all(len(value) <= 1024 and all(map(is_plain, value)) for value in values),
        "channels": all(type(each) in (int, NoneType) for each in about["channels"].values()),
        "model": all(about[name] is None or is_name(about[name]) for name in ("name", "type")),
        "quantizers": all(is_name(each) for each in data["quantizers"]),
    }
    if wrong := [name for name, is_sound in sound.items() if not is_sound]:
        raise UserError(f"its {wrong[0]} are of another type")


def is_name(value: Any) -> bool:
    """Return whether value is a text that fits into a message of one line."""
    return type(value) is str and len(value) <= 4096 and len(value.splitlines()) <= 1


def read_archive(content: bytes) -> Any:
    """Return what torch.save put into an archive, its checksums verified. It never compresses, nor overlaps parts."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise UserError("its end is missing: it was cut off")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        is_packed = any(each.compress_type != zipfile.ZIP_STORED for each in members)
        if is_packed or sum(each.file_size for each in members) > len(content) or len(members) > MOST_MEMBERS:
            raise UserError("its parts are compressed, too many, or larger than the file")
        if damaged := archive.testzip():
            raise UserError(f"{damaged[:80]!r} does not match its checksum")
        (stem,) = (each.filename[:-8] for each in members if each.filename.endswith("/data.pkl"))
        if f"{stem}byteorder" in archive.NameToInfo and archive.read(f"{stem}byteorder").decode() != sys.byteorder:
            raise UserError("it is from a machine of another byte order")
        read: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            """Return the bytes of a member of the archive as numbers of dtype."""
            if key in read and len(read[key]) > 8 * kvquant_file.MOST_LEVELS:
                raise UserError("it holds something large twice")
            if key not in read:
                read[key] = torch.frombuffer(bytearray(archive.read(f"{stem}data/{key}")), dtype=torch.uint8)
            return read[key].view(dtype)

        return kvquant_file.PlainUnpickler(
            io.BytesIO(archive.read(f"{stem}data.pkl")), kvquant_file.TORCH, storage
        ).load()


def read_ours(content: bytes) -> dict[str, Any]:
    """Return the content of a file that save wrote, its quantizers made.

    Version 2 held parts of scalar quantizers: a range, and a codebook for each width.
    """
    data = read_archive(content)
    version = data["format_version"] if data["format"] == FORMAT else None
    if version not in (2, VERSION):
        raise UserError(f"it has format version {str(version)[:20]}, and this program reads 2 and {VERSION}")
    made: dict[str, dict] = {}
    for name, parts in data["quantizers"].items():
        if version == VERSION:
            made[name] = {bits: made_of(state) for bits, state in parts.items()}
        else:
            lo, hi, codebooks = parts["lo"], parts["hi"], parts["codebooks"]
            made[name] = {bits: scalar_parts(lo, hi, **each) for bits, each in codebooks.items()}
    return {**data, "quantizers": made, "model": {"type": None, **data["model"]}}


def scalar_parts(lo, hi, levels, scale=1.0, offset=0.0) -> dict[str, Any]:
    """Return what was fitted of a ScalarQuantizer, in its fields' names."""
    return {"lo": lo, "hi": hi, "codebook": levels, "scale": scale, "offset": offset}


def fitted(data: Mapping, model_type: str, sites: Sequence[Site], settings: Mapping[Any, Setting]) -> dict:
    """Return settings with each quantizer as load's data has it, checked against the model.

    Raises UserError if the file was made for a model of another family or shape, or lacks a quantizer.
    """
    path, about, quantizers = data["path"], data["model"], data["quantizers"]
    if about["type"] not in (None, model_type):
        sides = f"a model of type {about['type']}, and this one is {model_type}"
        raise UserError(f"quantizer file {path!r} was calibrated for {sides}: calibrate again")
    here = {site.name: site.channels for site in sites}
    for name in quantizers:
        there = about["channels"].get(name) or here.get(name, "no")
        if there != here.get(name):
            origin = f"{path!r} was calibrated for {about['name'] or 'another model'}"
            has = f"it has {there} channels for {name}, this model has {here.get(name, 'none')}"
            raise UserError(f"quantizer file {origin}: {has}")
    channels = {site.key: site.channels for site in sites}
    return {
        row: {site: stored(data, site, plain, width_in_file(row, plain), channels) for site, plain in setting.items()}
        for row, setting in settings.items()
    }


def stored(data: Mapping, site: Site, plain: Any, width: Any, channels: Mapping[tuple[int, str], int]) -> Quantizer:
    """Return the quantizer that load's data has for a site in a width; plain is the same, not fitted.

    channels are those of all sites, by (layer, part).
    """
    path, known, reason = data["path"], data["quantizers"].get(site.name, {}), ""
    try:
        has_levels = width in known or getattr(plain, "levels", None) == "nuq"
        found = known[width if has_levels else None]  # KVQuant's own files may have ranges alone
        if not isinstance(found, Quantizer):
            found = replace(plain, **(found if plain.axis == "channel" else {**found, "lo": None, "hi": None}))
        asked = {name: getattr(plain, name) for name in ("recent", "counts_clipped") if hasattr(plain, name)}
        changed = {name: value for name, value in asked.items() if getattr(found, name) != value}
        found = replace(found, **changed) if changed else found
        if (found.bits, found.sinks) != (plain.bits, plain.sinks):
            raise UserError("it has other bits or sinks than its name and its settings say")
        if tuple(map(tuple, found.sources)) != plain.sources:
            raise UserError("it is predicted from other layers than are quantized here: leave --skip_layers as it was")
        blanks = [torch.zeros(1, found.sinks + 1, channels[source]) for source in plain.sources]
        found.quantize(torch.zeros(1, found.sinks + 1, site.channels), blanks)  # whether it fits so many channels
        if getattr(found, "axis", None) == "channel" and getattr(found, "lo", True) is None:
            raise UserError("its range is missing")
        if getattr(found, "scale", None) == "calibrated" and getattr(found, "amax", None) is None:
            raise UserError("its scale is missing")
        return found
    except UserError as error:
        reason = f" ({' '.join(str(error).split())})"
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError):
        pass
    raise UserError(f"quantizer file {path!r} has no usable {plain.bits}-bit quantizer for {site.name}{reason}")
