"""Names on the hub, against a small hub on loopback: what is fetched, when, how often, and what is said when it fails."""

import fcntl
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, ragged_rows, write_rows

from engine import config, hub
from engine.errors import DONE, ENVIRONMENT, SECURITY, USER, EngineError
from engine.hub import Base

RESOLVE = """
from engine import hub
from engine.errors import run
def main(argv):
    base = hub.resolve(argv[0], argv[1:] != ["random"])
    print(base.folder, base.name, base.commit)
run(main)
"""
COMMANDS = """
import contextlib, importlib, io, json, sys
from engine.errors import EngineError
for line in sys.stdin:
    module, *arguments = json.loads(line)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = importlib.import_module(f"engine.{module}").main(arguments) or 0
        except EngineError as error:
            code = error.exit_code
            print(error, file=err)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
NAME = "org/tiny-llama.1"
FETCHED = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}


class Hub:
    """Serves repositories; `requests` has (method, path) of every one. Fail-points: `refuse`, `slow_s`, `cut`."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: tuple[int, str, str] | None = None  # status, X-Error-Code, part of the path
        self.slow_s = 0.0
        self.cut: str | None = None  # "closed": half of the weights, then the line drops; "stuck": half, and no more
        self.let_go = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def push(self, files: dict[str, bytes], name: str = NAME, branch: str = "main") -> str:
        commit = f"{len(self.commits) + 1:040x}"
        self.commits[commit] = files
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def stop(self) -> None:
        self.let_go.set()
        self.server.shutdown()
        self.server.server_close()

    def count(self, method: str, part: str) -> int:
        return sum(part in path for verb, path in self.requests if verb == method)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0].replace("%2F", "/")
        self.requests.append((request.command, path))
        if self.refuse and self.refuse[2] in path:
            return self.send(request, self.refuse[0], b"", {"X-Error-Code": self.refuse[1]})
        if path == "/api/agent-harnesses":  # the package asks for this once a day
            return self.send(request, 200, b'{"standardEnvVars": [], "harnesses": {}}')
        api, resolve = path.removeprefix("/api/models/"), path.removeprefix("/")
        for name in self.branches:
            if api == name or api.startswith(f"{name}/revision/"):
                commit = self.commit_of(name, api.removeprefix(name).removeprefix("/revision/") or "main")
                if commit is None:
                    return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
                listing = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in self.commits[commit]]}
                return self.send(request, 200, json.dumps(listing).encode())
            if api.startswith(f"{name}/tree/"):
                files = self.commits[api.removeprefix(f"{name}/tree/")]
                tree = [{"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for file, data in files.items()]
                return self.send(request, 200, json.dumps(tree).encode())
            if resolve.startswith(f"{name}/resolve/"):
                revision, _, file = resolve.removeprefix(f"{name}/resolve/").partition("/")
                commit = self.commit_of(name, revision)
                data = self.commits[commit][file]
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
                return self.send(request, 200, data, headers, weights=file == "model.safetensors")
        self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def commit_of(self, name: str, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches[name].get(revision)

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None, weights: bool = False) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if weights and self.cut:
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            if self.cut == "stuck":
                self.let_go.wait(30)
            self.refuse = (500, "", "/model.safetensors")
            request.close_connection = True
            return
        time.sleep(self.slow_s if weights else 0)
        request.wfile.write(data)


@pytest.fixture
def server():
    one = Hub()
    yield one
    one.stop()


@pytest.fixture
def files(tiny) -> dict[str, bytes]:
    """A repository as they come: a model, and beside it what is not for us."""
    data = {path.name: path.read_bytes() for path in tiny.iterdir()} | {"tokenizer_config.json": b'{"add_bos_token": true}'}
    other = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "original/consolidated.00.pth", "training_args.bin")
    return data | {name: b"not for us" for name in other}


@pytest.fixture
def environment(server, tmp_path) -> dict[str, str]:
    """Nothing of ours: no token, no proxy, no setting of the package. It is read when the package is imported, hence processes."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(environment, tmp_path):
    """`start(name, *arguments, VARIABLE=value)`: a process that resolves a name, in a folder that is empty."""
    (tmp_path / "work").mkdir()
    started = []

    def run(*arguments: str, stderr=subprocess.PIPE, **more: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", RESOLVE, *arguments], cwd=tmp_path / "work", env=environment | more, text=True,
                                        stdout=subprocess.PIPE, stderr=stderr))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def resolve(start):
    """(exit code, Base or None, standard error) of a process that resolves a name."""

    def run(*arguments: str, **more: str) -> tuple[int, Base | None, str]:
        return result(start(*arguments, **more))

    return run


def result(process: subprocess.Popen) -> tuple[int, Base | None, str]:
    out, err = process.communicate(timeout=60)
    folder, name, commit = out.split() if out else (None, None, None)
    return process.returncode, Base(Path(folder), name, commit) if folder else None, err


def refused(outcome: tuple[int, Base | None, str], code: int, *parts: str) -> None:
    """Nothing but one line on standard error, with `parts` in it."""
    assert outcome[0] == code and outcome[1] is None and outcome[2].startswith("ERROR E-") and outcome[2].count("\n") == 1, outcome
    assert [part for part in parts if part not in outcome[2]] == [], outcome[2]


def test_first_fetched_then_cached_then_renewed(server, resolve, files):
    first = server.push(files)
    code, base, err = resolve(NAME)
    assert (code, base.name, base.commit, err) == (DONE, NAME, first, "")
    assert {path.name: path.read_bytes() for path in base.folder.iterdir()} == {name: files[name] for name in FETCHED}
    assert {path.rsplit("/", 1)[-1] for _, path in server.requests if "/resolve/" in path} == FETCHED
    assert [server.count("GET", f"/{name}") for name in sorted(FETCHED)] == [1, 1, 1, 1]

    server.requests.clear()  # nothing new: asked once, nothing fetched
    assert resolve(NAME) == (DONE, base, "")
    assert server.requests == [("GET", f"/api/models/{NAME}/revision/main")]

    server.requests.clear()  # offline, and pinned by commit: not even asked
    assert resolve(NAME, HF_HUB_OFFLINE="1") == (DONE, base, "")
    assert resolve(f"{NAME}@{first}") == (DONE, base, "")
    assert server.requests == []

    second = server.push({**files, "config.json": files["config.json"] + b"\n"})
    code, newer, err = resolve(NAME)
    assert (code, newer.commit, err) == (DONE, second, "") and (newer.folder / "config.json").read_bytes() == files["config.json"] + b"\n"
    assert [server.count("GET", f"/{name}") for name in sorted(FETCHED)] == [1, 0, 0, 0]  # what has not changed is not fetched again
    assert resolve(NAME, HF_HUB_OFFLINE="1") == (DONE, newer, "")
    assert resolve(f"{NAME}@{first}", HF_HUB_OFFLINE="1") == (DONE, base, "")


def test_what_is_fetched_of_a_large_repository(server, resolve):
    wanted = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    others = {"pytorch_model.bin.index.json", "flax_model.msgpack", "model.gguf", "modeling_own.py", "fp16/model.safetensors", "fp16/config.json"}
    server.push({name: name.encode() for name in wanted | others})
    assert {path.name for path in resolve(NAME, "random")[1].folder.iterdir()} == {name for name in wanted if "safetensors" not in name}
    assert {path.name for path in resolve(NAME)[1].folder.iterdir()} == wanted


def test_a_revision_is_a_branch_a_pull_request_or_a_commit(server, resolve, files):
    main = server.push(files)
    branch = server.push({**files, "config.json": files["config.json"] + b"\n"}, branch="v1.0")
    request = server.push({**files, "config.json": files["config.json"] + b"\n\n"}, branch="refs/pr/3")
    for revision, commit in (("v1.0", branch), ("refs/pr/3", request), (branch, branch)):
        code, base, err = resolve(f"{NAME}@{revision}")
        assert (code, base.name, base.commit, err) == (DONE, NAME, commit, "")
    assert resolve(f"{NAME}@refs/pr/3", HF_HUB_OFFLINE="1")[1].commit == request
    refused(resolve(f"{NAME}@v2"), USER, "HUB-REVISION", "no revision v2")
    refused(resolve(NAME, HF_HUB_OFFLINE="1"), ENVIRONMENT, "HF_HUB_OFFLINE is set")  # main was never fetched
    assert resolve(NAME)[1].commit == main


def test_out_of_reach_the_cached_commit_is_used_and_named(server, resolve, files):
    first = server.push(files)
    base = resolve(NAME)[1]
    server.refuse = (503, "", "/")
    for state in ("answers 503", "is gone"):
        if state == "is gone":
            server.stop()
        code, found, err = resolve(NAME)
        assert (code, found) == (DONE, base), state
        assert err.startswith("WARNING") and first in err and err.count("\n") == 1, err
        assert resolve(NAME, RANK="1") == (DONE, base, ""), "rank 0 speaks for all"
    assert resolve(f"{NAME}@{first}") == (DONE, base, "")


def test_nothing_cached_and_no_hub(server, resolve):
    server.stop()
    refused(resolve(NAME), ENVIRONMENT, "ENVIRONMENT-HUB", NAME, "is no folder here", "cannot be reached", "Connect")
    refused(resolve(NAME, HF_HUB_OFFLINE="1"), ENVIRONMENT, "ENVIRONMENT-HUB", "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(("status", "code", "where", "exit_code", "says"), [
    (401, "RepoNotFound", "/api/", USER, ("HUB-REPOSITORY", "no such model", "check the name", "hf auth login", "is no folder here")),
    (404, "", "/api/", USER, ("HUB-REPOSITORY", "check the name")),
    (403, "GatedRepo", "/api/", ENVIRONMENT, ("HUB-GATED", "accept the licence at http://127.0.0.1", NAME, "hf auth login")),
    (401, "GatedRepo", "/resolve/", ENVIRONMENT, ("HUB-GATED", "accept the licence")), (403, "", "/api/", ENVIRONMENT, ("HUB-FORBIDDEN", "hf auth login"))])
def test_each_refusal_says_what_to_do(server, resolve, files, status, code, where, exit_code, says):
    server.push(files)
    server.refuse = (status, code, where)
    refused(resolve(NAME), exit_code, *says)


def test_a_refusal_is_not_answered_with_the_cache(server, resolve, files):
    server.push(files)
    assert resolve(NAME)[0] == DONE
    server.refuse = (401, "RepoNotFound", "/api/")
    refused(resolve(NAME), USER, "HUB-REPOSITORY")


def test_pickles_are_never_requested(server, resolve, files):
    server.push({name: data for name, data in files.items() if not name.endswith("safetensors")})
    refused(resolve(NAME), SECURITY, "HUB-PICKLE", "pytorch_model.bin", "save_pretrained")
    assert not [path for _, path in server.requests if path.endswith((".bin", ".pth")) or "/resolve/" in path]
    code, base, _ = resolve(NAME, "random")  # a shape and a tokenizer need no weights
    assert code == DONE and {path.name for path in base.folder.iterdir()} == FETCHED - {"model.safetensors"}
    refused(resolve(f"{NAME}@{base.commit}"), SECURITY, "HUB-PICKLE")


@pytest.mark.parametrize(("names", "says"), [
    (("config.json", "README.md"), ("HUB-WEIGHTS", "no *.safetensors")),
    (("config.json", "onnx/model.safetensors", "consolidated.safetensors"), ("HUB-WEIGHTS", "no *.safetensors")),
    (("model.safetensors",), ("HUB-MODEL", "no config.json")), (("adapter_config.json", "adapter_model.safetensors"), ("HUB-MODEL", "is an adapter"))])
def test_a_repository_without_a_model(server, resolve, names, says):
    server.push({name: b"{}" for name in names})
    refused(resolve(NAME), USER, *says)
    assert server.count("GET", "/resolve/") == 0


@pytest.mark.parametrize("ranks", [("0", "0"), ("1", "0")])
def test_processes_at_once_fetch_each_file_once(server, start, files, ranks):
    commit, server.slow_s = server.push(files), 0.7
    started = [start(NAME, RANK=rank) for rank in ranks]
    found = [result(process) for process in started]
    assert [(code, base.commit) for code, base, _ in found] == [(DONE, commit)] * 2
    for name in FETCHED:
        assert [(method, server.count(method, f"/{name}")) for method in ("HEAD", "GET")] == [("HEAD", 1), ("GET", 1)], name
    waited = "".join(err for _, _, err in found).count("waiting")
    assert waited == (ranks == ("0", "0")), "beside rank 0, which shows progress, another waits"


@pytest.mark.parametrize("how", ["closed", "stuck"])
def test_a_broken_download_is_never_taken_for_a_whole_one(server, start, resolve, files, how):
    """The line drops, or the process is killed with half of the weights on disk."""
    old = server.push({**files, "model.safetensors": files["model.safetensors"] + b" "})
    assert resolve(NAME)[0] == DONE
    commit, server.cut = server.push(files), how
    server.requests.clear()
    process = start(NAME)
    if how == "stuck":
        while not server.count("GET", "/model.safetensors"):
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert result(process)[0] == -signal.SIGKILL
        server.let_go.set()
    else:
        code, base, err = result(process)
        assert code == ENVIRONMENT and base is None and err.splitlines()[-1].startswith("ERROR E-ENVIRONMENT-FETCH") and "start again" in err
    refused(resolve(f"{NAME}@{commit}", HF_HUB_OFFLINE="1"), ENVIRONMENT, "no whole copy")
    assert resolve(NAME, HF_HUB_OFFLINE="1")[1].commit == old, "without the hub the last whole one counts"

    server.cut = server.refuse = None
    server.requests.clear()
    code, base, err = resolve(f"{NAME}@{commit}")
    assert (code, base.commit, err) == (DONE, commit, "")
    assert {path.name: path.read_bytes() for path in base.folder.iterdir()} == {name: files[name] for name in FETCHED}
    assert server.count("GET", "/model.safetensors") == 1


def test_a_cache_that_others_filled_is_completed_or_doubted(server, resolve, files):
    """Without the list of files that the cache usually keeps nobody knows what is missing: the hub is asked, or the doubt is told."""
    commit = server.push(files)
    base = resolve(NAME)[1]
    for listing in base.folder.parent.parent.glob("trees/*"):
        listing.unlink()
    (base.folder / "tokenizer_config.json").unlink()
    code, found, err = resolve(f"{NAME}@{commit}", HF_HUB_OFFLINE="1")
    assert (code, found) == (DONE, base) and err.count("\n") == 1 and "is not known" in err
    assert resolve(f"{NAME}@{commit}") == (DONE, base, "")
    assert (base.folder / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_progress_is_for_rank_0_at_a_terminal(server, start, files, rank, shown):
    server.push(files)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = start(NAME, RANK=rank, stderr=theirs)
    os.close(theirs)
    assert process.communicate(timeout=60) and process.returncode == DONE
    seen = b""
    try:
        while block := os.read(ours, 4096):
            seen += block
    except OSError:  # the other end is closed
        os.close(ours)
    assert (b"%|" in seen) == shown, seen


def test_the_package_is_named_where_it_is_missing(start, tmp_path):
    (tmp_path / "work/huggingface_hub.py").write_text("raise ImportError('as if it were not there')")
    process = start(NAME, PYTHONPATH=f"{tmp_path / 'work'}:{ROOT}")
    refused(result(process), ENVIRONMENT, "ENVIRONMENT-EXTRA", NAME, "is no folder here", "huggingface_hub", "[hub]")


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("org/name", "meta-llama/Llama-3.2-1B", "org/name@main", "org/name@refs/pr/1", "o_1/n.v1-2@0123abc"):
        assert hub.is_name(text), text
    for text in ("", "name", "/org/name", "./org/name", "../name", "org/name/more", "org/", "org/na me", "org/name@", "org/name@../../x", "org/..", "org/a--b",
                 "örg/name", "org/name\n", "a" * 200_000):
        assert not hub.is_name(text), text[:20]
    Path("org/name").mkdir(parents=True)
    assert not hub.is_name("org/name") and hub.resolve("org/name") == Base(Path("org/name"), "org/name")


def test_the_recipe_takes_names_and_tells_both_ways(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(recipe("model.path=org/name@v1")).model.path == "org/name@v1"
    Path("org/empty").mkdir(parents=True)
    for wrong in ("nowhere", "models/of/mine", "org/empty", "/models/mine"):
        with pytest.raises(EngineError, match=f"model.path got {wrong}, expected a folder with config.json, or org/name"):
            config.load(recipe(f"model.path={wrong}"))


def test_ranks_that_found_different_commits_stop():
    Base(Path("a"), "org/name", "1").check_same(["1", "1"])
    with pytest.raises(EngineError, match="1, 2; write model.path=org/name@COMMIT"):
        Base(Path("a"), "org/name", "1").check_same(["1", "2"])
    with pytest.raises(EngineError, match="1, a folder"):
        Base(Path("a"), "org/name").check_same(["", "1"])


def test_training_stops_where_ranks_found_different_commits(ranks, recipe, tiny, monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda *_: Base(tiny, "org/name", os.environ["RANK"]))
    started = ranks(2, recipe())
    assert started.wait() == [USER, USER] and "ranks found different models: 0, 1" in started.log.read_text()


def test_a_run_from_the_hub_names_its_base_everywhere(server, files, environment, tmp_path):
    """Trained, exported, asked, converted; resumed with the commit it began with. One process for all, torch is slow to import."""
    process = subprocess.Popen([sys.executable, "-c", COMMANDS], cwd=tmp_path, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def command(*words: str) -> tuple[int, str, str]:
        print(json.dumps(words), file=process.stdin, flush=True)
        return tuple(json.loads(process.stdout.readline()))

    first = server.push(files)
    write_rows(tmp_path / "rows.jsonl", ragged_rows(23))
    (tmp_path / "recipe.yaml").write_text("{}")
    train = ["train", "recipe.yaml", f"model.path={NAME}", "data.train=rows.jsonl", "data.max_length=64", "lora.rank=2", "train.max_steps=1",
             "train.global_batch=4", "train.device=cpu", "run.name=run", "log.tensorboard=false"]
    code, out, err = command(*train)
    assert code == DONE and f"{NAME}@{first}, " in out, err
    run = tmp_path / "runs/run"
    assert json.loads((run / "run.json").read_text())["base"] == {"name": NAME, "commit": first}
    adapter = json.loads((run / "export/adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, first)

    server.push({**files, "model.safetensors": b"newer, and broken"})
    (run / "finished.json").unlink()
    code, out, err = command(*train)  # goes on with its own commit
    assert code == DONE and f"{NAME}@{first}, " in out, err
    code, out, err = command(*train)  # a new run, of the newest
    assert code == USER and "cannot be read as safetensors" in err

    ask = ["--prompt", "red", "--device", "cpu", "--max-new-tokens", "4"]
    code, answer, err = command("generate", "--adapter", str(run / "export/adapter"), *ask)
    assert code == DONE and answer, err
    code, out, err = command("generate", "--model", f"{NAME}@{first}", *ask)
    assert code == DONE and f"{NAME}@{first}: template" in err, err
    (run / "export/adapter/adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "org/other"}))
    code, _, err = command("generate", "--adapter", str(run / "export/adapter"), *ask)
    assert code == USER and err.startswith("ERROR E-HUB-REPOSITORY") and "adapter_config.json names a base model: org/other@" in err and "--model" in err

    code, out, err = command("convert", f"{NAME}@{first}", "out", "--dtype", "fp32")
    assert code == DONE and (tmp_path / "out/model.safetensors").is_file(), err
    code, out, err = command("convert", "org/missing", "out2")
    assert code == USER and err.startswith("ERROR E-HUB-REPOSITORY org/missing: is no folder here"), err
    server.requests.clear()
    code, out, err = command("convert", "org/missing.gguf", "out2")
    assert code == USER and "is not there, expected a .gguf file" in err and not server.requests
    process.stdin.close()
    assert process.wait(10) == 0
