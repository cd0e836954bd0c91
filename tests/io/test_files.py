"""Whatever lies where a file of weights should be: its tensors, or one line that names the file and says what it is."""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from condrl import UsageError
from condrl.io.files import load_metadata, load_tensors, load_torch, save_tensors, why_unreadable

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
WEIGHTS = {"a": torch.arange(300.0), "b": torch.ones(2, 3)}
TEXTS = {
    "Git LFS pointer.*git lfs pull": POINTER,
    "is empty": b"",
    "web page": b"<!DOCTYPE html><html>404</html>",
}


def safetensors(folder: Path, name: str = "w.safetensors") -> Path:
    save_file(WEIGHTS, folder / name, metadata={"format": "pt", "rank": "4"})
    return folder / name


def pickled(folder: Path, name: str = "w.pt", **options: bool) -> Path:
    torch.save(WEIGHTS, folder / name, **options)
    return folder / name


def one_line(load, path):
    with pytest.raises(UsageError) as found:
        load(path, "config model.lora")
    message = str(found.value)
    assert "\n" not in message
    assert message.startswith(f"config model.lora: {path} ")
    return message


def test_whole_files_are_read(tmp_path):
    for read in (
        load_tensors(safetensors(tmp_path), "x"),
        load_torch(pickled(tmp_path), "x"),
        load_torch(pickled(tmp_path, "old.pt", _use_new_zipfile_serialization=False), "x"),
    ):
        assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())
        assert set(read) == set(WEIGHTS)
    assert load_metadata(safetensors(tmp_path), "x") == {"format": "pt", "rank": "4"}
    assert why_unreadable(safetensors(tmp_path)) is None


@pytest.mark.parametrize("why", TEXTS)
@pytest.mark.parametrize("load", [load_tensors, load_metadata, load_torch])
def test_texts_in_the_place_of_weights(why, load, tmp_path):
    import re

    for suffix in (".safetensors", ".pt", ".bin", ".json"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(TEXTS[why])
        assert re.search(why, one_line(load, path))
        assert re.search(why, why_unreadable(path))


@pytest.mark.parametrize("load", [load_tensors, load_metadata])
def test_truncated_and_strange_safetensors(load, tmp_path):
    whole = safetensors(tmp_path).read_bytes()
    path = tmp_path / "x.safetensors"
    for size in (9, 40, len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert "is truncated" in one_line(load, path)
    assert f"{size:,} of {len(whole):,} bytes" in one_line(load, path)
    path.write_bytes(pickled(tmp_path).read_bytes())
    assert "is a pickle" in one_line(load, path)
    path.write_bytes(b"GGUF and so on, and on, and on")
    assert "is not a safetensors file" in one_line(load, path)
    path.write_bytes(whole[:8] + b"{" + b"x" * (len(whole) - 9))
    assert "header cannot be read" in one_line(load, path)
    assert "does not exist" in one_line(load, tmp_path / "nowhere.safetensors")
    assert "is a folder" in one_line(load, tmp_path)


def test_truncated_and_strange_pickles(tmp_path):
    path = tmp_path / "x.pt"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        whole = pickled(tmp_path, **options).read_bytes()
        for size in (5, 200, len(whole) // 2):
            path.write_bytes(whole[:size])
            assert "is damaged" in one_line(load_torch, path)
    path.write_bytes(safetensors(tmp_path).read_bytes())
    assert "is not a file of torch.save" in one_line(load_torch, path)
    torch.save({"a": Path("anything but weights")}, path)
    assert "holds more than weights" in one_line(load_torch, path)
    torch.save(torch.zeros(3), path)
    assert "holds a Tensor" in one_line(load_torch, path)


def test_written_files_are_the_same_bytes_for_the_same_content(tmp_path):
    metadata = {f"key {i}": str(i) for i in range(20)}
    written = []
    for i, order in enumerate((1, -1)):
        path = tmp_path / f"{i}.safetensors"
        save_tensors(WEIGHTS, path, dict(list(metadata.items())[::order]))
        written.append(path.read_bytes())
        assert int.from_bytes(written[-1][:8], "little") % 8 == 0
    assert written[0] == written[1]
    assert load_metadata(path, "x") == metadata
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in load_tensors(path, "x").items())
    assert why_unreadable(path) is None


def test_damaged_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, ')
    assert "not valid JSON" in why_unreadable(path)
    path.write_text("[1]")
    assert "not a JSON object" in why_unreadable(path)
    path.write_text('{"a": 1}')
    assert why_unreadable(path) is None


def test_every_text_file_is_utf_8_whatever_the_locale():
    """Each call in the code that opens one says so."""
    calls = []
    for path in (path for room in ("condrl", "plugins", "scripts") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name in ("read_text", "write_text", "open", "fdopen"):
                calls.append((f"{path}:{node.lineno}", name, ast.unparse(node)))
    texts = [call for call in calls if call[1].endswith("_text") or re.search(r"open\(.*'[rwa]\+?'", call[2])]
    assert len(texts) > 20
    assert [where for where, _, call in texts if "utf-8" not in call] == []
