"""The container image, by its text: no docker is needed. What a build gives is for who has one; see the file's own first lines."""

import re
import shlex

import pytest
from conftest import ROOT


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def test_it_runs_as_a_user_without_rights_or_login():
    user, = of("USER")
    words = [name for name, _ in instructions()]
    assert user not in ("root", "0") and words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert any(f"--shell /usr/sbin/nologin {user}" in line for line in of("RUN"))


@pytest.mark.parametrize("word", ["ssh", "jupyter", "notebook", "passw", "sudo", "chpasswd", "token", "secret", "curl", "wget", "--bind_all", "0.0.0.0",
                                  "index-url", "trusted-host", "chmod 777"])
def test_nothing_in_it_listens_logs_in_or_knows_a_secret(word):
    assert not [rest for _, rest in instructions() if word in rest.lower()]


def test_no_port_is_open_and_the_way_to_tensorboard_is_told():
    assert not of("EXPOSE") and not of("ADD") and not of("ONBUILD")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "ssh -L 6006:127.0.0.1:6006" in text and "--gpus all" in text and "docker run --rm" in text and "--privileged" not in text


def test_packages_are_the_pinned_ones():
    installs = [line for line in of("RUN") if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs)
    base, = of("FROM")
    assert re.fullmatch(r"[\w/.-]+:\d+\.\d+[\w.-]*", base), "a base of a version"
    minor = int(re.search(r":3\.(\d+)", base)[1])
    assert minor >= int(re.search(r'python_requires=">=3\.(\d+)"', (ROOT / "setup.py").read_text())[1])
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE), "which brings CUDA, cuDNN and NCCL of one build"


def test_every_requirement_of_the_package_is_pinned():
    names = re.findall(r'"([A-Za-z][\w.-]*)(?:>=[\d.]+)?"', re.search(r"(hub = .*?extras_require.*?\})", (ROOT / "setup.py").read_text(), re.DOTALL)[1])
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)}
    wanted = {name.lower().replace("_", "-") for name in names} - {"ddp-instruct-engine", "hub", "parquet", "gpu", "dev", "engine", "engine.*", "apache-2.0"}
    assert {"torch", "safetensors", "omegaconf", "tokenizers", "pyarrow"} <= wanted and wanted <= pinned, wanted - pinned


def test_logs_and_models_lie_outside_and_all_that_is_copied_is_there():
    volumes = of("VOLUME")[0]
    assert "/engine/runs" in volumes and "/engine/models" in volumes
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in of("COPY") for source in shlex.split(line)[:-1]}
    assert copied == kept and all((ROOT / source).exists() for source in copied)
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*", "no runs, weights, keys or history by accident"
    assert of("ENTRYPOINT") == ['["./torchrun.sh"]'] and "ENGINE_PYTHON=" in " ".join(of("ENV"))
