"""What comes from others is refused within a second and a bound of memory; what a run writes is its owner's alone and tells no secrets."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import held
from safetensors.torch import save

from engine import adapter, checkpoint, tensorfile
from engine.checkpoint import Snapshot
from engine.errors import CHECKPOINT, SECURITY, USER, EngineError
from engine.models import weights

SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


# --- H2: hostile safetensors -------------------------------------------------------------------------------------------


def raw(header: bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def of(entries: object, data: bytes = b"\0" * 8) -> bytes:
    return raw(json.dumps(entries).encode(), data)


def with_(**changes) -> bytes:
    return of({"w": {**SOUND, **changes}})


def many(count: int, entry: str) -> bytes:
    return raw(b"{" + b",".join(b'"%d":%s' % (number, entry.encode()) for number in range(count)) + b"}")


# name -> the file, made in the test, since some are large
HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"", "seven bytes": lambda: b"\0" * 7, "no header": lambda: raw(b"", b""), "length 2^63": lambda: raw(b"{}", length=1 << 63),
    "length 2^64 - 1": lambda: raw(b"{}", length=(1 << 64) - 1), "length beyond the file": lambda: raw(b"{}", b"", length=3),
    "99 MB of JSON": lambda: of({"__metadata__": {"a": "x" * 99_000_000}}), "15 MB of notes": lambda: of({"__metadata__": {"a": "y" * 15_000_000},
    "w": SOUND}, b""),
    "15 MB of small objects": lambda: many(1_500_000, "{}"), "a million entries": lambda: many(1_000_000, '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
    "30,000 entries": lambda: many(30_000, '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
    "a long list": lambda: raw(b'{"w":[' + b"1000," * 3_000_000 + b"1]}"),
    "nested lists": lambda: raw(b"[" * 8_000_000), "nested objects": lambda: raw(b'{"a":' * 2_000_000), "not UTF-8": lambda: raw(b'{"\xff":{}}'),
    "half a character": lambda: raw(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "no JSON": lambda: raw(b"{w"),
    "a list": lambda: of([SOUND]),
    "a name twice": lambda: raw(b'{"w":%s,"w":%s}' % ((json.dumps(SOUND).encode(),) * 2)), "a field twice": lambda: raw(
        b'{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'),
    "an empty name": lambda: of({"": SOUND}), "a name of escapes": lambda: of({"\x1b[2J": SOUND}), "a long name": lambda: of({"w" * 10_000: SOUND}),
    "notes that are no text": lambda: of({"__metadata__": {"a": 1}, "w": SOUND}), "no shape": lambda: of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "one field more": lambda: with_(more=1), "an unknown type": lambda: with_(dtype="F33"), "a type that is none": lambda: with_(dtype=["F32"]),
    "a lie about the type": lambda: with_(dtype="F64"), "a shape that overflows": lambda: with_(shape=[1 << 32, 1 << 32]),
    "a shape that overflows to 2": lambda: with_(shape=[(1 << 31) + 1, 1 << 33, 2]), "a huge number": lambda: raw(
        b'{"w":{"dtype":"F32","shape":[1%s],"data_offsets":[0,8]}}' % (b"0" * 9_000_000)),
    "a number of infinity": lambda: raw(b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}'), "a negative shape": lambda: with_(shape=[-2]),
    "two negative sizes": lambda: with_(shape=[-1, -2]), "a size that is none": lambda: with_(shape=[2.0]),
    "a size that is true": lambda: with_(shape=[True, 2]),
    "a shape of many dimensions": lambda: with_(shape=[2] + [1] * 100_000), "offsets backwards": lambda: with_(data_offsets=[8, 0]),
    "negative offsets": lambda: with_(data_offsets=[-8, 0]), "three offsets": lambda: with_(data_offsets=[0, 8, 8]),
    "offsets beyond the file": lambda: with_(data_offsets=[0, 1 << 40], shape=[1 << 38]),
    "an overlap": lambda: of({"v": SOUND, "w": SOUND}), "a partial overlap": lambda: of({"v": SOUND, "w": {**SOUND, "data_offsets": [4, 12]}}, b"\0" * 12),
    "a hole": lambda: of({"v": SOUND, "w": {**SOUND, "data_offsets": [12, 20]}}, b"\0" * 20), "bytes at the end": lambda: of({"w": SOUND}, b"\0" * 9),
    "too few bytes": lambda: of({"w": SOUND}, b"\0" * 7), "data without a tensor": lambda: of({}),
}


def refused_as(code: int, what: Callable[[], object]) -> None:
    with pytest.raises(EngineError) as caught:
        what()
    assert caught.value.exit_code == code and len(caught.value.text) < 1000 and caught.value.text.isprintable(), caught.value


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "model").mkdir()
    shutil.copyfile(tiny / "config.json", folder / "model/config.json")
    (folder / "adapter").mkdir()
    (folder / "adapter" / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    checkpoint.save(folder, 1, Snapshot({"w": torch.ones(2)}, {"w.step": torch.ones(())}, {}), keep=1, best=None)
    return {"model": folder / "model", "adapter": folder / "adapter", "checkpoint": folder / "step-000000001"}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_weights_are_refused_wherever_they_lie(places, what):
    model, path = places["model"] / "model.safetensors", places["checkpoint"]
    model.unlink(missing_ok=True)
    model.write_bytes(HOSTILE[what]())
    for other in (places["adapter"] / adapter.WEIGHTS, path / "optimizer.safetensors"):
        other.unlink(missing_ok=True)
        other.hardlink_to(model)
    reseal(path)
    held(lambda: refused_as(USER, lambda: weights.build(model.parent, "pretrained", 0, torch.float32, torch.float32, torch.device("cpu"))), 1.0, 200)
    held(lambda: refused_as(USER, lambda: adapter.digest(places["adapter"])), 1.0, 200)
    held(lambda: refused_as(CHECKPOINT, lambda: checkpoint.load(path.parent, 1)), 1.0, 200)


def reseal(path: Path) -> None:
    """As who wrote the files would: a manifest that fits them."""
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": checkpoint._sha256(path / name)} for name in checkpoint.FILES}
    (path / checkpoint.MANIFEST).write_text(checkpoint._sealed({"format": 1, "step": 1, "files": files}))


def test_sound_files_are_read_as_they_are(tmp_path):
    tensors = {"é": torch.arange(6.0).view(2, 3).to(torch.bfloat16), "empty": torch.zeros(0, 4), "one": torch.tensor(7), "b": torch.tensor([True, False]),
               "long": torch.randn(700_001)}
    (tmp_path / "a").write_bytes(save(tensors, metadata={"x": "{,,}"}))
    found = tensorfile.load(tmp_path / "a")
    assert found.keys() == tensors.keys() and all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with tensorfile.Reader(tmp_path / "a") as file:
        for dtype in (torch.float64, torch.bfloat16):
            for name in ("é", "long", "one", "empty"):
                assert torch.equal(file.tensor(name, dtype), tensors[name].to(dtype))


def test_a_pipe_or_a_device_among_weights_is_no_wait(places, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises((ValueError, OSError)):
            tensorfile.Reader(path)


def test_a_file_cut_while_it_loads_is_an_error_and_no_signal(tiny, tmp_path, monkeypatch):
    """H3: its pages would be gone under a mapping, and reading them is SIGBUS."""
    shutil.copytree(tiny, tmp_path / "model")
    path, read = tmp_path / "model/model.safetensors", tensorfile.Reader.tensor

    def cut(self, name, *where):
        os.truncate(path, 5000)
        return read(self, name, *where)

    monkeypatch.setattr(tensorfile.Reader, "tensor", cut)
    held(lambda: refused_as(USER, lambda: weights.build(tmp_path / "model", "pretrained", 0, torch.float32, torch.float32, torch.device("cpu"))), 5, 200)


def test_weights_in_use_are_no_longer_those_on_disk(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    model = weights.build(tmp_path / "model", "pretrained", 0, torch.float32, torch.float32, torch.device("cpu"))
    before = model.lm_head.weight.clone()
    with (tmp_path / "model/model.safetensors").open("r+b") as file:
        file.write(b"\xff" * os.path.getsize(file.name))
    os.truncate(tmp_path / "model/model.safetensors", 0)
    assert torch.equal(model.lm_head.weight, before)


# --- H4: paths that lead elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "/proc/self/environ", "a/b.safetensors", "..", ".", "", "x\0.safetensors",
                                  "model.safetensors/", "config.json", 7, None, ["model.safetensors"], {}])
def test_an_index_names_files_beside_it_alone(tiny, tmp_path, name):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / weights.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    def build() -> None:
        with pytest.raises(EngineError) as caught:
            weights.build(tmp_path / "model", "pretrained", 0, torch.float32, torch.float32, torch.device("cpu"))
        assert caught.value.exit_code in (SECURITY, USER)

    assert {Path(path).name for path in opened(build)} <= {"config.json", weights.INDEX}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "[" * 200_000])
def test_an_index_that_is_none_is_told(tiny, tmp_path, text):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / weights.INDEX).write_text(text)
    refused_as(USER, lambda: weights.build(tmp_path / "model", "pretrained", 0, torch.float32, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "model.safetensors\n"])
def test_a_manifest_names_nothing_of_its_own(tmp_path, name):
    """Its names are held against those that a checkpoint has; none is ever a path that is opened."""
    path = checkpoint.save(tmp_path, 1, Snapshot({"w": torch.ones(2)}, {"w.step": torch.ones(())}, {}), keep=1, best=None)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop("model.safetensors")
    del manifest["seal"]
    (path / checkpoint.MANIFEST).write_text(checkpoint._sealed(manifest))
    found: list = []
    assert [Path(one).name for one in opened(lambda: found.append(checkpoint.damage(path)))] == [checkpoint.MANIFEST]
    assert found == ["manifest.json belongs to something else"]


def opened(what: Callable[[], None]) -> list[str]:
    """Every path that Python opens meanwhile, but its own code."""
    found: list[str] = []
    sys.addaudithook(lambda event, arguments: found.append(str(arguments[0])) if event == "open" else None)  # for good: it costs little
    what()
    return [path for path in found if not path.endswith((".py", ".pyc"))]
