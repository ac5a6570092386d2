"""What comes from others is refused within a second and a bound of memory; what a run writes is its owner's alone and tells no secrets."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, held, loaded, write_rows
from safetensors.torch import save

from engine import adapter, checkpoint, config, distributed, gguf_in, rundir, tensorfile, train
from engine.checkpoint import Snapshot
from engine.data.tokenizer import load_tokenizer
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
    "15 MB of small objects": lambda: many(1_200_000, "{}"), "a million entries": lambda: many(1_000_000, '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
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
    "no element of a shape that overflows": lambda: of({"v": {**SOUND, "shape": [0, 1 << 59, 1 << 59], "data_offsets": [0, 0]}, "w": SOUND}),
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
    held(lambda: refused_as(CHECKPOINT, lambda: loaded(path.parent, 1)), 1.0, 200)


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


def gguf(keys: bytes, count: int = 1, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + keys


def key(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q1sI", 1, b"k", kind) + value


@pytest.mark.parametrize("text", [
    gguf(key(9, struct.pack("<IQ", 0, 1 << 60))), gguf(key(9, struct.pack("<IQ", 0, 1 << 22)) + b"\0" * (1 << 22)), gguf(b"", count=1 << 60),
    gguf(key(9, struct.pack("<IQ", 9, 1)) * 3000), gguf(key(9, struct.pack("<IQ", 8, 1)) + struct.pack("<Q", (1 << 64) - 1)), gguf(b"", 0, 1 << 40),
    gguf(struct.pack("<Q", 1 << 63)), gguf(key(13, b"\0" * 8)), b"GGUF", b""])
def test_a_hostile_gguf_is_refused(tmp_path, text):
    path = tmp_path / "a.gguf"
    path.write_bytes(text)

    def read() -> None:
        with pytest.raises(EngineError) as caught:
            gguf_in.to_folder(path, tmp_path / "out", "bf16")
        assert caught.value.exit_code == USER and caught.value.name == "CONVERT-FILE" and not (tmp_path / "out").exists()

    held(read, 3.0, 100)


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": "32"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"hidden_size": 1.5}, {"head_dim": True},
    {"rms_norm_eps": "x"}, {"rope_theta": [1]}, {"rope_scaling": "linear"}, {"rope_scaling": {"rope_type": ["a"]}}, {"num_key_value_heads": {}},
    {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, {"model_type": []}, {"model_type": "qwen2", "use_sliding_window": True, "layer_types": 3},
    {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, [], 3, "[" * 200_000], ids=lambda changes: str(changes)[:60])
def test_a_config_that_is_none_is_told(tiny, tmp_path, changes):
    sound = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sound, **changes}) if isinstance(changes, dict) else changes if isinstance(changes, str)
                                          else json.dumps(changes))

    def read() -> None:
        with pytest.raises(EngineError) as caught:
            weights.build(tmp_path, "random", 0, torch.float32, torch.float32, torch.device("meta"))
        assert caught.value.exit_code == USER and caught.value.name in ("MODEL-CONFIG", "MODEL-FAMILY")

    held(read, 1.0, 50)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 200_000, "{"])
def test_a_tokenizers_file_that_is_none_is_told(tiny, tmp_path, text):
    shutil.copy(tiny / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(EngineError, match="tokenizer_config.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.exit_code == USER


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


# --- A whole run on one node, watched: secrets, sockets, modes, what people wrote ---------------------------------------

CANARY = "canary-4711-xyzzy"
SECRETS = {name: f"{CANARY}-{name.lower()}" for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN")}
SECRETS |= {"HF_ENDPOINT": f"https://user:{CANARY}-login@hub.invalid", "http_proxy": f"http://user:{CANARY}-proxy@proxy.invalid:3128"}
WRITTEN = "what nobody but its author should read"


@pytest.fixture(scope="module")
def launched(tiny) -> Iterator[dict]:
    """Two ranks by the launcher, in a folder that every user may enter, so that the run's own modes are what keeps them out."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        rows = [{"instruction": f"{WRITTEN} {number}", "input": "", "output": f"{WRITTEN}, red blue {number}"} for number in range(24)]
        write_rows(folder / "rows.jsonl", [*rows, {"instruction": WRITTEN, "output": [WRITTEN]}])
        (folder / "recipe.yaml").write_text(f"""
            run: {{folder: {folder}/runs, name: run}}
            model: {{path: {tiny}}}
            data: {{train: {folder}/rows.jsonl, validation: {folder}/rows.jsonl, cache: {folder}/cache, max_length: 128, on_bad_row: skip}}
            lora: {{rank: 2}}
            train: {{device: cpu, epochs: 2, global_batch: 4}}
            export: {{kinds: [adapter, model]}}
            evaluate: {{samples: 0, exact_match_rows: 2, max_new_tokens: 4}}""")
        command = [sys.executable, "-m", "engine.launch", "--standalone", "--nproc-per-node", "2", "-m", "engine.train", str(folder / "recipe.yaml")]
        environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1"}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, umask=0)
        sockets: set[str] = set()
        while process.poll() is None:
            sockets |= listeners({process.pid, *children(process.pid)})
            time.sleep(0.2)
        text = process.stdout.read().decode()
        assert process.returncode == 0, text
        yield {"folder": folder, "text": text, "sockets": sockets}


def children(pid: int) -> set[int]:
    try:
        own = {int(number) for task in Path(f"/proc/{pid}/task").iterdir() for number in (task / "children").read_text().split()}
    except OSError:
        return set()
    return own.union(*map(children, own))


def listeners(pids: set[int]) -> set[str]:
    """Local addresses, as the kernel writes them, of the sockets on which these processes listen."""
    held = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # it is closed
                held.add(os.readlink(link))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[1].rpartition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in held}


def test_one_node_listens_on_loopback_alone(launched):
    assert launched["sockets"] == {"0100007F"}, "127.0.0.1 and no other, and at least that of the ranks was seen"


def test_so_do_ranks_whose_launcher_has_opened_no_socket_for_them(ranks):
    def listens() -> int:
        distributed.init("cpu", 60.0)
        return listeners({os.getpid()}) != {"0100007F"}

    assert ranks(2, listens).wait(60) == [0, 0]


def test_secrets_of_the_environment_are_nowhere(launched):
    assert CANARY not in launched["text"]
    files = [path for path in launched["folder"].rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_what_people_wrote_is_not_said(launched):
    """But in TensorBoard's texts and the cache, which are rows and as private as the run."""
    assert WRITTEN not in launched["text"] and "red blue" not in launched["text"]
    holding = {path.relative_to(launched["folder"]).parts[0:3:2] for path in launched["folder"].rglob("*")
               if path.is_file() and WRITTEN.encode() in path.read_bytes()}
    assert holding <= {("rows.jsonl",), ("runs", "tensorboard"), ("cache", "index.json")}, holding


def test_what_a_run_writes_is_its_owners_alone(launched):
    made = [path for name in ("runs", "cache") for path in (launched["folder"] / name, *(launched["folder"] / name).rglob("*"))]
    wrong = {str(path): oct(path.stat().st_mode & 0o777) for path in made if path.stat().st_mode & 0o777 != (0o700 if path.is_dir() else 0o600)}
    assert len(made) > 20 and not wrong


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="takes root and setpriv to become another user")
def test_another_user_of_the_machine_can_neither_read_nor_write_it(launched):
    run = launched["folder"] / "runs/run"
    other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]
    assert subprocess.run([*other, "ls", launched["folder"]], capture_output=True).returncode == 0, "it gets as far as that"
    for command in (["cat", run / "run.json"], ["ls", run], ["touch", run / "x"], ["cat", run / "export/model/model.safetensors"],
                    ["ls", launched["folder"] / "cache"], ["rm", "-rf", run / "checkpoints"]):
        done = subprocess.run([*other, *map(str, command)], capture_output=True, text=True)
        assert "Permission denied" in done.stderr and not done.stdout, command
    assert any((run / "checkpoints").iterdir())


# --- H9, H5: what is echoed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["model.path=https://user:PASSWORD@hub.invalid/x", "HF_TOKEN=PASSWORD", "run.token=PASSWORD", "data.train=s3://PASSWORD@b/x",
                                      "model.path=\x1b]0;title\x07\x1b[2J", "run.name=a\nb\x1b[1m", "data.train=a\u202egpj.exe", "run.name=$(touch x)/../y"])
def test_errors_echo_neither_passwords_nor_escapes(tmp_path, argument):
    (tmp_path / "recipe.yaml").write_text("{}")
    done = subprocess.run([sys.executable, "-m", "engine.train", str(tmp_path / "recipe.yaml"), argument], cwd=ROOT, capture_output=True)
    text = done.stderr.decode()
    assert done.returncode == USER and "PASSWORD" not in text and text.replace("\n", "").isprintable() and text.startswith("ERROR E-"), text


def test_the_record_of_the_command_has_no_passwords(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "recipe.yaml", "data.cache=https://user:PASSWORD@x/y", "run.name=\x1b[2J"])
    rundir.describe(tmp_path, config.Recipe(), {})
    assert json.loads((tmp_path / "run.json").read_text())["command"] == ["train", "recipe.yaml", "data.cache=https://…@x/y", "run.name=\\x1b[2J"]


def test_a_terminal_shows_what_rows_hold_and_obeys_none_of_it(tmp_path):
    """In a real terminal: our own colours and progress pass, the rest is written out."""
    program = ("import sys; from engine import errors\n"
               "def main(argv):\n    print('\\x1b[32mgreen\\x1b[0m \\x1b]0;title\\x07 \\x1b[2J \\u202e é 猫\\u3000\\t.'); return 6\n"
               "errors.run(main)")
    ours, theirs = os.openpty()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert done.returncode == 6 and os.read(ours, 1000).decode() == (
        "\x1b[32mgreen\x1b[0m \\x1b]0;title\\x07 \\x1b[2J \\u202e é 猫\u3000\t.\r\n")


# --- H12, H7 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["open folder", "open file", "another owner", "nothing"])
def test_a_checkpoint_that_others_may_write_is_told(tmp_path, capsys, how):
    path = checkpoint.save(tmp_path, 1, Snapshot({"w": torch.ones(2)}, {"w.step": torch.ones(())}, {}), keep=1, best=None)
    if how == "open folder":
        tmp_path.chmod(0o777)
    elif how == "open file":
        (path / "state.json").chmod(0o666)
    elif how == "another owner":
        if os.geteuid():
            pytest.skip("takes root to give a file away")
        os.chown(path / "model.safetensors", 65534, -1)
    assert checkpoint.newest_whole(tmp_path) == 1
    assert capsys.readouterr().err.count("another user may write there") == (how != "nothing")


def test_nothing_is_imported_from_a_models_folder(tiny, recipe, trained, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    canary = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "torch.py", "safetensors.py", "sitecustomize.py"):
        (tmp_path / "model" / name).write_text(canary)
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoConfig": "configuration_evil.Evil",
                                "AutoModelForCausalLM": "modeling_evil.Evil"}}))
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}))
    trained(1, recipe(f"model.path={tmp_path / 'model'}", "train.max_steps=1"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "trust_remote_code": True}))
    refused_as(USER, lambda: weights.build(path.parent, "pretrained", 0, torch.float32, torch.float32, torch.device("cpu")))
    assert not (tmp_path / "canary").exists()


# --- A whole run and its resume under the interpreter's audit ----------------------------------------------------------


def audited(main: Callable[[], int], allowed: tuple[str, ...]) -> int:
    """Runs `main`; the number of events that a run must not have, which are printed."""
    seen: list[str] = []

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            if not os.fsdecode(arguments[0]).startswith(allowed):
                seen.append(f"{event} {arguments}")
        elif event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.bind"):
            seen.append(f"{event} {arguments}")
        elif event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name not in ("git", Path(sys.executable).name):
            seen.append(f"{event} {arguments}")

    sys.addaudithook(note)
    main()
    print("\n".join(seen))
    return len(seen)


def test_a_run_its_evaluations_export_and_resume_do_nothing_that_it_should_not(recipe, ranks, tmp_path):
    rows = write_rows(tmp_path / "validation.jsonl", [{"instruction": "red", "input": "", "output": "blue"}] * 3)
    argv = recipe(f"data.validation={rows}", "evaluate.exact_match_rows=2", "evaluate.samples=1", "lora.rank=2", "export.kinds=[adapter,model]",
                  "train.epochs=3")
    allowed = (str(tmp_path / "runs"), str(tmp_path / "cache"), "/dev/null")
    for _ in range(2):
        started = ranks(1, lambda: audited(lambda: train.main(argv), allowed))
        assert started.wait() == [0], started.log.read_text()[-3000:]
        (tmp_path / "runs/run/finished.json").unlink()
        shutil.rmtree(sorted((tmp_path / "runs/run/checkpoints").iterdir())[-1])


@pytest.mark.parametrize("what", [lambda folder: (folder / "outside").write_text("x"), lambda folder: os.system("true"),
                                  lambda folder: pickle.loads(pickle.dumps(Path("x"))), lambda folder: subprocess.run(["true"])])
def test_the_audit_can_fail(ranks, tmp_path, what):
    assert ranks(1, lambda: audited(lambda: what(tmp_path), (str(tmp_path / "runs"),))).wait() != [0]
