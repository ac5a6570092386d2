"""The way in: engine.launch returns the ranks' exit codes, torchrun.sh picks processes, environment.sh installs once."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

from engine import node, saver
from engine.errors import BUG, CHECKPOINT, DONE, ENVIRONMENT, NUMERIC, PEER, PREEMPTED, USER, EngineError
from engine.launch import code_after, first_cause

ROOT = Path(__file__).resolve().parent.parent


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


# --- engine.launch ---------------------------------------------------------------------------------------------------

TOY = """
import os, signal, socket, sys, time
kind, rank = sys.argv[1], int(os.environ["RANK"])
if kind == "numeric":
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a rank that is on its way out
    open(f"numeric{rank}", "w").close()
    while not os.path.exists("numeric1"):
        time.sleep(0.05)
    time.sleep(0.6 * rank)
    sys.exit(6 if rank else 5)  # the rank that lost its peer is the first to go
if kind == "raise" and rank == 1:
    raise ValueError("toy")
if kind == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if kind in ("stop", "hung up", "asleep"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(6 if kind == "hung up" else 75))  # to tell it from a rank that just dies
    open(f"{kind}{rank}", "w").close()
    if kind == "asleep":
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(600):  # one sleep of a minute would not end for a signal that comes just before it begins
        time.sleep(0.1)
if kind == "port":
    while rank == 0 and not os.path.exists("port is taken"):
        time.sleep(0.05)
    with socket.socket() as another:
        try:
            another.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        except OSError:
            open("port is taken", "w").close()
            sys.exit(0)
    sys.exit(1)
if kind in ("asked", "refused", "lost"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # as a rank that has not met the others yet
    open(f"{kind}{os.environ['TORCHELASTIC_RESTART_COUNT']}-{rank}", "w").close()
    while not os.path.exists(f"{kind}{os.environ['TORCHELASTIC_RESTART_COUNT']}-1"):
        time.sleep(0.05)
    time.sleep(60 * rank)
    sys.exit({"asked": 75, "refused": 3, "lost": 5}[kind])
if kind == "stopped":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if rank == 0:
        os.symlink(f"/proc/{os.getpid()}/stat", "stopped0")
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    while not os.path.exists("stopped0") or ") T " not in open("stopped0").read():
        time.sleep(0.05)
    sys.exit(6)
if kind == "asked late":
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    open(f"asked late{rank}", "w").close()
    if rank == 0:
        time.sleep(6)  # for a save, once the other has failed
        sys.exit(5 if len(heard) == 1 else 143)
    while not os.path.exists("asked late0"):
        time.sleep(0.05)
    sys.exit(6)
if kind == "saving":
    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank on its way out, which waits for a save
        open("saving0", "w").close()
        time.sleep(35)
        open("saved", "w").close()
        sys.exit(5)
    while not os.path.exists("saving0"):
        time.sleep(0.05)
    sys.exit(6)
"""


def of_several(nodes: int = 1) -> list[str]:
    """torchrun's options for the first of several nodes; it takes one, too."""
    return ["--nnodes", str(nodes), "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]


@pytest.fixture(scope="module", params=["node", "nodes"])
def launched(request, tmp_path_factory) -> dict[str, Any]:
    """Every kind of toy run, all at once, by either launcher."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY)

    def command(*more: str) -> list[str]:
        where = ["--standalone"] if request.param == "node" else of_several()
        return [sys.executable, "-m", "engine.launch", *where, "--nproc-per-node", "2", *more, "-m", "toy"]

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOGLEVEL", None)
    once, twice = ("done", "numeric", "raise", "kill", "stop", "hung up", "asleep", "port", "stopped", "asked late"), ("asked", "refused", "lost")
    kinds = {**{kind: command() for kind in once}, **{kind: command("--max-restarts", "1") for kind in twice}}
    processes = {kind: subprocess.Popen([*start, kind], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # which tests under nohup have ignored
                 for kind, start in kinds.items()}
    deadline = time.monotonic() + 120
    for kind, number in (("stop", signal.SIGTERM), ("hung up", signal.SIGHUP), ("asleep", signal.SIGINT), ("asked late", signal.SIGTERM)):
        while not all((folder / f"{kind}{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2 if kind == "asleep" else 0)  # they fall asleep, and of those asked late one hears that the other has failed
        processes[kind].send_signal(number)
    ended = {"folder": folder}
    for kind, process in processes.items():
        try:
            out, err = process.communicate(timeout=60)
            code = process.returncode
        except subprocess.TimeoutExpired:
            for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(one), signal.SIGKILL)
            out, err = process.communicate()
            code = "it had to be killed"
        ended[kind] = subprocess.CompletedProcess(process.args, code, out, err)
    return ended


@pytest.mark.parametrize("kind, code, stderr", [
    ("done", DONE, ""), ("port", DONE, ""), ("numeric", NUMERIC, ""), ("stop", PREEMPTED, ""), ("hung up", NUMERIC, ""), ("asleep", PREEMPTED, ""),
    ("stopped", NUMERIC, ""), ("asked late", NUMERIC, ""),
    ("raise", 1, "ValueError: toy"), ("kill", PEER, "SIGKILL"),
])
def test_launch_returns_the_ranks_exit_code_and_adds_no_text_of_torchruns(launched, kind, code, stderr):
    assert launched[kind].returncode == code, launched[kind].stderr
    assert stderr in launched[kind].stderr
    assert "elastic" not in launched[kind].stderr and "Root Cause" not in launched[kind].stderr


@pytest.mark.parametrize("kind, code, starts", [("asked", PREEMPTED, 1), ("refused", CHECKPOINT, 1), ("lost", PEER, 2)])
def test_what_a_restart_would_undo_or_cannot_mend_is_not_started_again(launched, kind, code, starts):
    """The other rank leaves with 75 each time, for torchrun tells it to stop: that is no wish of anybody's."""
    assert launched[kind].returncode == code, launched[kind].stderr
    assert len(list(launched["folder"].glob(f"{kind}*-0"))) == starts


def test_a_launch_that_waits_for_another_node_obeys_a_stop(tmp_path):
    where = [*of_several(2), "--nproc-per-node", "1"]
    port = int(where[where.index("--master-port") + 1])
    waits = subprocess.Popen([sys.executable, "-m", "engine.launch", *where, "-m", "toy", "done"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while True:
        with socket.socket() as probe, suppress(ConnectionRefusedError):
            probe.connect(("127.0.0.1", port))
            break
        assert waits.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    waits.terminate()
    try:
        assert waits.wait(5) == PREEMPTED
    finally:
        waits.kill()


def test_launchers_wait_longer_for_a_save_than_the_rank_that_writes_it():
    assert node.SAVING_S > saver.PATIENCE_S + saver.DISK_S


@pytest.mark.faults
@pytest.mark.parametrize("where", [["--standalone"], of_several()], ids=["node", "nodes"])
def test_a_rank_that_saves_has_longer_than_torchruns_thirty_seconds(tmp_path, where):
    (tmp_path / "toy.py").write_text(TOY)
    ended = subprocess.run([sys.executable, "-m", "engine.launch", *where, "--nproc-per-node", "2", "-m", "toy", "saving"], cwd=tmp_path,
                           env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}, timeout=120)
    assert ended.returncode == NUMERIC and (tmp_path / "saved").exists()


def test_a_killed_rank_is_told_in_one_line(launched):
    line, = launched["kill"].stderr.splitlines()
    assert line.startswith("ERROR E-PEER-KILLED rank 1 was ended by SIGKILL")


@pytest.mark.parametrize("failures, code", [
    ([(0, NUMERIC)], NUMERIC),
    ([(2, PEER), (0, -15), (1, NUMERIC)], NUMERIC),
    ([(1, CHECKPOINT), (0, BUG)], CHECKPOINT),
    ([(0, PEER), (1, -15), (2, -9)], PEER),
    ([(0, PEER), (1, PREEMPTED)], PEER),
    ([(1, PREEMPTED), (0, PREEMPTED), (2, PEER)], PREEMPTED),
    ([(0, PREEMPTED), (1, 143)], PREEMPTED),
    ([(0, PEER), (1, 143)], PEER),
])
def test_the_first_failure_counts_unless_it_only_lost_a_peer(failures, code):
    assert first_cause(failures) == code


def test_a_rank_killed_first_is_the_cause_whatever_the_others_said():
    with pytest.raises(EngineError, match="rank 3 was ended by SIGSEGV") as raised:
        first_cause([(3, -11), (0, BUG)])
    assert raised.value.exit_code == PEER


@pytest.mark.parametrize("codes, code", [
    ([], PREEMPTED), ([None, None], 143), ([-15, -15], PREEMPTED), ([143, 143], 143), ([-9, -9], 143), ([0, None], 143),
    ([0, 0], DONE), ([0, PREEMPTED], PREEMPTED), ([PEER, PREEMPTED], PREEMPTED), ([PEER, PEER], PEER), ([-9, PEER], PEER),
])
def test_a_stopped_launch_returns_what_the_ranks_returned(codes, code):
    assert code_after(signal.SIGTERM, codes) == code


def test_a_mistake_in_the_recipe_is_told_once_and_without_importing_torch(tmp_path):
    text = ("import sys; from engine import errors, launch\n"
            "try: errors.run(launch.main)\n"
            "finally: assert 'torch' not in sys.modules")
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "engine.train", "absent.yaml"]
    ended = subprocess.run([sys.executable, "-c", text, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True)
    assert ended.returncode == USER
    assert ended.stderr.startswith("ERROR E-CONFIG-RECIPE absent.yaml") and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("where", ["--standalone", "--nnodes=1"])
def test_a_wrong_option_is_told_in_one_line_whatever_rank_the_environment_is_of(where):
    ended = subprocess.run([sys.executable, "-m", "engine.launch", where, "--nproc-per-node", "abc", "-m", "toy"], cwd=ROOT,
                           env={**os.environ, "RANK": "1"}, capture_output=True, text=True)
    assert ended.returncode == USER and "abc" in ended.stderr
    assert ended.stderr.startswith("ERROR E-") and len(ended.stderr.splitlines()) == 1


def test_a_stop_before_there_are_ranks_is_obeyed():
    text = "import os; from engine import config, errors, launch; config.load = lambda _: os.kill(os.getpid(), 10); errors.run(launch.main)"
    assert subprocess.run([sys.executable, "-c", text, "--standalone", "-m", "engine.train"], cwd=ROOT).returncode == PREEMPTED


@contextmanager
def rank_that_stays() -> Iterator[subprocess.Popen]:
    text = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, start_new_session=True) as rank:
        try:
            rank.stdout.readline()
            yield rank
        finally:
            rank.kill()


def test_requests_to_stop_give_a_rank_that_stays_no_more_time(monkeypatch, capsys):
    monkeypatch.setattr(node, "SAVING_S", 1.0)
    monkeypatch.setattr(node, "STOP_S", 20.0)
    failed = subprocess.Popen(["false"])
    failed.wait()
    with rank_that_stays() as stays:
        began = time.monotonic()
        ended = node._watched([failed, stays], [signal.SIGTERM, signal.SIGTERM])
        assert ended == ([(0, 1), (1, -9)], signal.SIGTERM, [1, -9]) and time.monotonic() - began < 10
    assert capsys.readouterr().err == "WARNING rank 1 has not left though told to, and is killed\n"


def test_nobody_is_started_beside_a_rank_that_could_not_be_killed(monkeypatch):
    starts = []
    monkeypatch.setattr(node, "sent_on", lambda: [])
    monkeypatch.setattr(node, "_start", lambda *start: starts.append(start))
    monkeypatch.setattr(node, "_watched", lambda *_: node.Ended([(0, PEER)], None, [PEER, None]))
    node.launched(["toy"], 2, 3, False)
    assert len(starts) == 1


def test_where_a_process_cannot_be_started_those_before_it_are_ended(monkeypatch):
    started, start = [], subprocess.Popen

    def limited(*arguments, **options):
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(start(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", limited)
    with pytest.raises(EngineError, match="process 2 of 2 cannot be started") as raised:
        node._start(["http.server", "0"], 2, 0)
    assert raised.value.exit_code == ENVIRONMENT and started[0].wait(20) == -signal.SIGKILL


# --- torchrun.sh -----------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(tmp_path):
    """Runs torchrun.sh on a machine of 8 cores and `gpus` GPUs; the Python it starts records what it was given."""
    record = tmp_path / "record"
    python = script(tmp_path / "python", f'printf "%s\\n" "${{OMP_NUM_THREADS:-unset}}" "$@" >"{record}"')
    script(tmp_path / "bin/nproc", "echo 8")
    script(tmp_path / "bin/scontrol", 'echo "$*" >&2; printf "%s\\n" node-a node-b')

    def run(*arguments: str, gpus: int = 0, **variables: str) -> tuple[int, list[str], str]:
        script(tmp_path / "bin/nvidia-smi", f'for n in $(seq {gpus}); do echo "GPU $n: H"; echo "  MIG 1g Device 0:"; done')
        record.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "ENGINE_PYTHON": str(python), **variables}
        ended = subprocess.run([ROOT / "torchrun.sh", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return ended.returncode, record.read_text().splitlines() if record.exists() else [], ended.stderr

    return run


def command(place: list[str], ranks: int, *arguments: str) -> list[str]:
    return ["-m", "engine.launch", *place, "--nproc-per-node", str(ranks), "-m", "engine.train", *arguments]


@pytest.mark.parametrize("gpus, variables, ranks, threads", [
    (0, {}, 2, "4"),
    (0, {"NPROC_PER_NODE": "3"}, 3, "2"),
    (0, {"NPROC_PER_NODE": "16"}, 16, "1"),
    (0, {"OMP_NUM_THREADS": "5"}, 2, "5"),
    (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 2, "4"),
    (4, {}, 4, "unset"),
    (4, {"CUDA_VISIBLE_DEVICES": "0,GPU-1-1,3"}, 3, "unset"),
    (4, {"CUDA_VISIBLE_DEVICES": ""}, 2, "4"),
    (4, {"CUDA_VISIBLE_DEVICES": "-1"}, 2, "4"),
    (4, {"NPROC_PER_NODE": "1"}, 1, "unset"),
])
def test_one_rank_per_gpu_or_two_on_cpu(torchrun, gpus, variables, ranks, threads):
    code, record, stderr = torchrun("my recipe.yaml", "optim.lr=1e-4", gpus=gpus, **variables)
    assert code == 0 and len(stderr.splitlines()) == 1 and stderr.startswith(f"Starting {ranks} rank(s) per node on ")
    assert record == [threads, *command(["--standalone"], ranks, "my recipe.yaml", "optim.lr=1e-4")]


def test_help_is_not_announced_as_a_start(torchrun):
    assert torchrun("--help")[1:] == (["4", *command(["--standalone"], 2, "--help")], "")


def test_several_nodes_by_hand_or_by_slurm(torchrun):
    by_hand = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host"}
    place = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "host", "--master-port", "29500"]
    assert torchrun(**by_hand)[1] == ["4", *command(place, 2)]
    assert torchrun(**by_hand, MASTER_PORT="1234")[1] == ["4", *command([*place[:-1], "1234"], 2)]

    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "1000042"}
    place = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "node-a", "--master-port", "25042"]
    code, record, stderr = torchrun(**slurm, gpus=8)
    assert (code, record) == (0, ["unset", *command(place, 8)])
    assert "show hostnames node-[a-b]" in stderr and "node 0 of 2, meeting at node-a:25042" in stderr


def test_ranks_start_again_as_often_as_asked(torchrun):
    assert torchrun(MAX_RESTARTS="3")[1] == ["4", *command(["--standalone", "--max-restarts", "3"], 2)]
    assert torchrun(MAX_RESTARTS="0")[1] == ["4", *command(["--standalone"], 2)]


@pytest.mark.parametrize("variables, said", [
    ({"NNODES": "two"}, "NNODES: got two"),
    ({"NNODES": "2", "MASTER_ADDR": "host"}, "NODE_RANK: got ''"),
    ({"NNODES": "2", "MASTER_ADDR": "host", "NODE_RANK": "2"}, "NODE_RANK: got '2'"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: is not set"),
    ({"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n", "SLURM_LOCALID": "1"}, "--ntasks-per-node=1"),
    ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE: got 0"),
    ({"MAX_RESTARTS": "no"}, "MAX_RESTARTS: got no"),
])
def test_a_launch_that_cannot_work_is_refused_in_one_line(torchrun, variables, said):
    code, record, stderr = torchrun(**variables)
    assert (code, record) == (USER, [])
    assert stderr.splitlines()[-1].startswith("ERROR E-LAUNCH-") and said in stderr and stderr.count("ERROR") == 1


# --- environment.sh --------------------------------------------------------------------------------------------------

# A python3 that writes down its calls. It makes a .venv of itself, and its pip does what the file `pip` says.
PYTHON3 = """
echo "$*" >>calls
case "$*" in
  *fcntl*) exec {real} "$@" ;;
  *version_info*) [ ! -e old ] ;;
  *ensurepip*) [ ! -e without-venv ] ;;
  "-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp {fake} .venv/bin/python ;;
  "-m pip install -c"*) eval "$(cat pip)" ;;
esac
"""


class Tree:
    """A copy of what environment.sh needs, with the fake python3 on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("environment.sh", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        fake = folder / "bin/python3"
        script(fake, PYTHON3.format(real=sys.executable, fake=fake))
        self.write("pip", "true")

    def write(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def start(self, extras: str = "hub") -> subprocess.Popen:
        environment = {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        environment.pop("ENGINE_PYTHON", None)
        command = f'set -euo pipefail; source ./environment.sh {extras}; echo "$python"'
        return subprocess.Popen(["bash", "-c", command], cwd=self.folder, env=environment, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, extras: str = "hub") -> tuple[int, list[str], str]:
        """Exit code, what was made ("venv", "hub", "dev", a package) and stderr."""
        self.write("calls")
        process = self.start(extras)
        out, err = process.communicate(timeout=20)
        if process.returncode == 0:
            assert out == f"{self.folder}/.venv/bin/python\n"
        return process.returncode, self.made(), err

    def made(self) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines()
        return ["venv" if "venv" in call else call.split()[-1].strip(".[]") for call in calls if call.startswith(("-m venv", "-m pip install -c"))]


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path.resolve())


def test_the_first_call_installs_and_the_second_only_looks(tree):
    assert tree.run()[:2] == (0, ["venv", "hub"])
    assert tree.run() == (0, [], "")
    assert "pip install" not in (tree.folder / "calls").read_text()


def test_a_dev_environment_serves_hub_and_not_the_other_way(tree):
    tree.run()
    assert tree.run("dev")[1] == ["dev", "mistral-common"]
    assert tree.run("hub")[1] == [] and tree.run("dev")[1] == []


def test_new_pins_and_a_moved_folder_install_again(tree, tmp_path_factory):
    tree.run()
    with open(tree.folder / "constraints.txt", "a") as file:
        file.write("more==1\n")
    assert tree.run()[1] == ["hub"]
    tree.folder = tree.folder.rename(tmp_path_factory.mktemp("elsewhere").resolve() / "moved")
    tree.write("bin/python3", (tree.folder / ".venv/bin/python").read_text())
    assert tree.run()[1] == ["hub"]


def test_a_broken_environment_is_made_anew(tree):
    tree.run()
    script(tree.folder / ".venv/bin/python", "exit 1")
    assert tree.run()[:2] == (0, ["venv", "hub"])


def test_an_install_killed_half_way_is_taken_up(tree):
    packages = tree.folder / ".venv/lib/python3.1/site-packages"
    tree.write("pip", f"mkdir -p {packages}/whole.dist-info {packages}/cut.dist-info\n"
                      f"touch {packages}/whole.dist-info/INSTALLER here; sleep 60")
    tree.write("calls")
    process = tree.start()
    while not (tree.folder / "here").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    tree.write("pip", "true")
    assert tree.run()[:2] == (0, ["hub"])
    assert [path.name for path in packages.iterdir()] == ["whole.dist-info"]
    assert tree.run() == (0, [], "")


def test_of_two_launches_at_once_one_installs_and_the_other_waits(tree):
    tree.write("pip", "sleep 1")
    tree.write("calls")
    processes = [tree.start(), tree.start()]
    said = [process.communicate(timeout=20)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert tree.made() == ["venv", "hub"]
    assert sum("waiting for it" in text for text in said) == 1


@pytest.mark.parametrize("trouble, name", [("old", "PYTHON"), ("without-venv", "PYTHON"), ("pip", "INSTALL")])
def test_what_the_machine_lacks_is_told_in_one_line(tree, trouble, name):
    tree.write(trouble, "false")
    code, made, stderr = tree.run()
    assert code == 4 and stderr.count("ERROR") == 1
    assert stderr.splitlines()[-1].startswith(f"ERROR E-ENVIRONMENT-{name} ")
    assert tree.run()[0] == 4  # a failed install leaves no stamp
