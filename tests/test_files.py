"""Files are written whole or not at all, and nothing that is read is destroyed."""

import os

import pytest

import quant_utils as qu
from simquant.files import check_writable, write_atomically


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_file_is_written_whole_also_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, content in (("file", b"first"), ("link", b"second"), ("new", b"")):
        write_atomically(str(tmp_path / name), lambda file, content=content: file.write(content))
    assert contents(tmp_path) == {"file": b"second", "link": b"second", "new": b""}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_what_fails_on_the_way_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error, moment):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        assert contents(tmp_path)["file"] == b"old" and len(contents(tmp_path)) == 2
        raise error

    if moment != "write":
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(type(error)) as raised:
        write_atomically(str(path), fail if moment == "write" else lambda file: file.write(b"new"))
    assert contents(tmp_path) == {"file": b"old"}
    said = f"{str(path)!r} could not be written (No space left on device): what stood there is untouched"
    assert str(raised.value) == (said if isinstance(error, OSError) else "")


@pytest.mark.parametrize(
    ("match", "paths"),
    [
        ("is also read, or named twice", ["t.txt", "link.txt", "./model/../t.txt", "model/config.json", "new.json"]),
        ("is not a regular file", ["model", "new/", "", "/dev/null"]),
        (r"cannot be written \(", ["no/o.json", "t.txt/o.json", "loop", "a" * 300]),
        ("is write-protected", ["old.json"]),
    ],
)
def test_outputs_that_cannot_be_or_would_destroy_an_input_are_refused(tmp_path, monkeypatch, match, paths):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "t.txt", "old.json"):
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "link.txt").symlink_to("t.txt")
    (tmp_path / "loop").symlink_to("loop")
    before = contents(tmp_path)
    check_writable(["old.json", "new.json", None], ["model", "t.txt", None, "wikitext2"])
    if match == "is write-protected":  # not by permissions: root may write all
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    for path in paths:
        with pytest.raises(qu.UserError, match=f"^output {path!r} {match}"):
            check_writable(["./new.json", None, path], ["model", "t.txt", None, "wikitext2"])
    assert contents(tmp_path) == before
