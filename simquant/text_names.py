"""Names of texts, and the files that they stand for. Nothing here imports torch."""

from __future__ import annotations

import os

DATASETS = ("wikitext2", "c4")
C4_FROM = "c4="  # before a path whose documents are sampled as those of c4 are
TEXT_FILES = (".txt", ".txt.gz", ".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")


def text_label(name: str) -> str:
    """Return what a text is called in a report: c4 if its documents are sampled as c4's are, else its name."""
    return "c4" if name.startswith(C4_FROM) else name


def files_read(*names: str) -> list[str]:
    """Return the files that names of texts stand for, a folder's in order; those of the hub are left out."""
    paths = [name.removeprefix(C4_FROM) for name in names if name not in DATASETS]
    return [file for path in paths for file in (files_in(path) if os.path.isdir(path) else [path])]


def files_in(folder: str) -> list[str]:
    """Return the text files of a folder itself, sorted by name, without hidden ones."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(TEXT_FILES) and name[0] != ".")
    return [file for name in names if os.path.isfile(file := os.path.join(folder, name))]
