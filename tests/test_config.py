"""Recipes: a mistake is told by file, line and nearest key, all of them at once, and before torch is imported."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT, held

from engine import config
from engine.errors import USER, EngineError


def slips(word: str) -> set[str]:
    """`word` with one letter dropped, doubled, or swapped with the next."""
    dropped = {word[:i] + word[i + 1 :] for i in range(len(word))}
    doubled = {word[:i] + word[i] + word[i:] for i in range(len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return (dropped | doubled | swapped) - {word, ""}


@pytest.mark.parametrize("key", config.options())
def test_every_slip_in_every_key_is_refused_with_a_suggestion(tmp_path, key):
    section, name = key.split(".")
    own = sorted(slip for slip in slips(name) if f"{section}.{slip}" not in config.options())
    wrong = [f"{section}.{slip}" for slip in own] + [f"{slip}.{name}" for slip in sorted(slips(section))]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"# a comment\n{section}:\n" + "".join(f"  {slip}: 1\n" for slip in own))
    problems = message([str(path), *(f"{slip}=1" for slip in wrong)]).splitlines()
    expected = [f"{path}:{line}: unknown option {section}.{slip}; did you mean {key}?" for line, slip in enumerate(own, 3)]
    expected += [f"command line: unknown option {slip}; did you mean {key}?" for slip in wrong]
    assert problems == [f"ERROR E-CONFIG-RECIPE {problem}" for problem in expected]


def message(argv: list[str]) -> str:
    with pytest.raises(EngineError) as caught:
        config.load(argv)
    assert caught.value.exit_code == USER
    return str(caught.value)


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optim:\n  lr: fast\n  schedul: cosine\n  clip_norm: -1\ntrain:\n  epochs: 1.5\n  precision: bf61\n"
                    "  packing: true\n  micro_batch: true\noptim: {lr: 1}\nmodle: {path: x}\n")
    found = message([str(path), "lora.rank=-3", "data.max_length=[1"])
    for words in (":2: optim.lr: got 'fast', expected a number", ":3: unknown option optim.schedul; did you mean optim.schedule?",
                  ":4: optim.clip_norm: got -1.0, expected at least 0", ":6: train.epochs: got 1.5, expected a whole number",
                  ":7: train.precision: got 'bf61', expected one of fp32, bf16, fp16; did you mean bf16?",
                  ":8: unknown option train.packing; did you mean data.packing?", ":9: train.micro_batch: got True, expected a whole number",
                  ":10: optim is given twice", ":11: unknown option modle; did you mean", "command line: lora.rank: got -3, expected at least 0",
                  "command line: data.max_length=[1: the value is not YAML"):
        assert words in found, f"{words!r} is missing from\n{found}"
    assert found.count("ERROR E-CONFIG-RECIPE") == 11


@pytest.mark.parametrize(("overrides", "words"), [
    (["train.micro_batch=99"], "command line: train.micro_batch got 99, expected at most train.global_batch = 8"),
    (["lora.rank=4", "lora.rank_pattern={q_proj: 0}"], "lora.rank_pattern got {'q_proj': 0}, expected at least 1"),
    (["lora.rank=4", "lora.rank_pattern={q_proj: x}"], "lora.rank_pattern: got {'q_proj': 'x'}, expected names with whole numbers"),
    (["lora.rank=4", "lora.alpha_pattern=3"], "lora.alpha_pattern: got 3, expected names with numbers"),
    (["lora.rank=4", "lora.targets=[]"], "lora.targets is empty"), (["model.path=nowhere"], "model.path got nowhere, expected a folder with config.json"),
    (["data.train=nothing.jsonl"], "data.train got nothing.jsonl, expected a file that exists"), (["model.dtype=bf16"], "model.dtype got bf16 without LoRA"),
    (["optim.warmup_steps=3", "optim.warmup_ratio=0.1"], "optim.warmup_steps and optim.warmup_ratio are both given"),
    (["optim.betas=[0.9]"], "optim.betas got [0.9], expected two numbers"),
    (["optim.name=adamw_bf16"], "model.dtype got fp32 without LoRA, expected bf16: optim.name=adamw_bf16 holds trained weights in bf16"),
    (["optim.name=adamw_bf16", "model.dtype=bf16", "lora.rank=4"], "optim.name got adamw_bf16 with LoRA, expected adamw"),
    (["optim.name=adamw_bf16", "model.dtype=bf16", "train.precision=fp16"], "train.precision got fp16 with optim.name=adamw_bf16, expected bf16 or fp32"),
    (["evaluate.exact_match_rows=5"], "evaluate.exact_match_rows needs data.validation"), (["run.name=../up"], "run.name got '../up'"),
])
def test_options_that_contradict_each_other_are_named(recipe, overrides, words):
    assert words in message(recipe(*overrides))


def test_a_tilde_is_the_users_home_in_every_path(recipe, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, target in (("tiny", tiny), ("adapter", tmp_path / "made")):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    (tmp_path / "made/adapter_config.json").write_text("{}")
    cfg = config.load(recipe("run.folder=~/a", "data.cache=~/b", "model.path=~/tiny", "lora.start=~/adapter", "data.train=~/rows.jsonl",
                             "data.validation=[{path: ~/*.jsonl}, {path: '~/rows.jsonl', name: two}]"))
    paths = [cfg.run.folder, cfg.data.cache, cfg.model.path, cfg.lora.start, *(one.path for of in ("train", "validation") for one in cfg.data.sources(of))]
    assert paths == [str(tmp_path / name) for name in ("a", "b", "tiny", "adapter", "rows.jsonl", "*.jsonl", "rows.jsonl")]
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert config.load(recipe("run.folder=~/a")).run.folder == "~/a", "nobody knows a home: it is a name as any other"


def test_overrides_win_and_a_dumped_recipe_loads_to_the_same(recipe, tmp_path):
    loaded = config.load(recipe("optim.lr=1e-4", "lora.rank=4", "lora.targets=[k_proj, up_proj]", "train.max_steps=null"))
    assert loaded.optim.lr == 1e-4 and loaded.lora.targets == ["k_proj", "up_proj"] and loaded.train.max_steps is None
    (tmp_path / "dumped.yaml").write_text(config.dump(loaded))
    assert config.load([str(tmp_path / "dumped.yaml")]) == loaded


def test_every_option_is_documented_and_every_hardware_option_exists():
    for key, spec in config.options().items():
        assert len(spec.metadata["text"]) > 10 and key in config.help_text()
    for prefix in config.HARDWARE:
        assert any(key.startswith(prefix) for key in config.options())


def test_nothing_in_a_recipe_is_executed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run:\n  name: !!python/object/apply:pathlib.Path.touch [{tmp_path}/canary]\n")
    assert ":2: run.name: could not determine a constructor" in message([str(path)])
    assert not (tmp_path / "canary").exists()


def test_a_mistake_is_told_in_seconds_without_torch(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optim:\n  lrr: 1\n")
    program = f"import sys; sys.argv = ['train', {str(path)!r}]; sys.modules['torch'] = None; from engine import errors, train; errors.run(train.main)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == USER and time.monotonic() - began < 3
    assert done.stderr == f"ERROR E-CONFIG-RECIPE {path}:2: unknown option optim.lrr; did you mean optim.lr?\n"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_once_its_files_are_there(path, monkeypatch):
    """Weights and rows that a user brings are not in the repository; everything else about the recipe is checked."""
    monkeypatch.setattr(config.Path, "is_file", lambda self: True)
    monkeypatch.setattr(config.Path, "exists", lambda self: True)
    loaded = config.load([str(path)])
    assert loaded.run.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ") and "torchrun" in path.read_text(encoding="utf-8")


# --- What YAML makes of things -----------------------------------------------------------------------------------------

OK = {"optim.lr": [("1e-4", 1e-4), ("1.e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("1", 1.0), ("+1.5", 1.5), ("'1e-4'", 1e-4), ("1_0.5", 10.5)],
      "train.epochs": [("1_000", 1000), ("010", 10), ("'3'", 3), ("+3", 3)], "train.max_steps": [("null", None), ("~", None), ("", None), ("7", 7)],
      "data.packing": [("yes", True), ("no", False), ("Off", False), ("TRUE", True), ("'on'", True)],
      "run.name": [("123", "123"), ("2026-11-25", "2026-11-25"), ("1:30", "1:30"), ("'no'", "no"), ("1e3", "1000.0"), ("0x10", "0x10")],
      "lora.targets": [("[q_proj]", ["q_proj"]), ("[]", [])]}
WRONG = {"optim.lr": ["fast", "null", "true", "[1]", "{a: 1}", "1,5", "1:30", ".inf", "-.inf", ".nan", "!!float x", "inf", "nan", "-1", "1e999"],
         "train.epochs": ["1.5", "1e3", "0x10", "0b11", "1:30", "true", "yes", "null", "''", "0", "-1", "9" * 5000, "!!int x"],
         "data.packing": ["2", "maybe", "null", "1.0", "[true]"], "run.name": ["true", "no", "[a]", "{a: b}", "!!set {a, b}", "!!binary _w==", "a\\nb", "???"],
         "train.max_steps": ["none", "0"], "lora.targets": ["[q_proj", "{a: b}", "q_proj", "3", "null"], "train.precision": ["16", "bf61", "null"]}


@pytest.mark.parametrize("key, text, value", [(key, *case) for key, cases in OK.items() for case in cases])
def test_what_yaml_means_is_what_it_looks_like(recipe, tmp_path, key, text, value):
    section, name = key.split(".")
    arguments = [argument for argument in recipe() if not argument.startswith(f"{key}=")]
    (tmp_path / "recipe.yaml").write_text(f"{section}:\n  {name}: {text}\n")
    for argv in (arguments, [*arguments, f"{key}={text}"]):
        assert getattr(getattr(config.load(argv), section), name) == (value or ("recipe" if name == "name" else value))


@pytest.mark.parametrize("key, text", [(key, text) for key, cases in WRONG.items() for text in cases])
def test_what_yaml_makes_of_it_is_of_another_kind(recipe, tmp_path, key, text):
    section, name = key.split(".")
    (tmp_path / "recipe.yaml").write_text(f"{section}:\n  {name}: {text}\n" if "\\" not in text else f'{section}:\n  {name}: "{text}"\n')
    arguments = [argument for argument in recipe() if not argument.startswith(f"{key}=")]
    assert f"{tmp_path}/recipe.yaml:" in message(arguments)
    if "\\" not in text:
        (tmp_path / "recipe.yaml").write_text("{}")
        assert f"command line: {key}" in message([*arguments, f"{key}={text}"])


@pytest.mark.parametrize("key", [key for key, spec in config.options().items() if spec.metadata["low"] is not None or spec.metadata["choices"]])
def test_values_out_of_range_are_refused(recipe, key):
    spec = config.options()[key]
    low, high = spec.metadata["low"], spec.metadata["high"]
    whole = "int" in str(spec.type)
    wrong = [low - 1, low - (1 if whole else 1e-9)] if low is not None else ["nosuch"]
    wrong += [high + 1e-9, high + 1] if high is not None and not whole else []
    for value in wrong:
        text = f"[{value}]" if spec.type == list[str] else value
        assert f"command line: {key}: got" in message(recipe(f"{key}={text}"))


# --- Hostile recipes: told within a second and in little memory --------------------------------------------------------

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)) + "data: {train: *a29}\n"
HOSTILE = {
    "a key twice": ("optim:\n  lr: 1\n  lr: 2\n", ":3: optim.lr is given twice"), "a section twice": ("optim: {lr: 1}\noptim: {lr: 1}\n",
    "optim is given twice"),
    "a tab": ("optim:\n\tlr: 1\n", ":2: not YAML"), "indentation": ("optim:\n  lr: 1\n eps: 1\n", ":3: not YAML"), "100 MB": (None,
    "has more than 65,536 bytes"),
    "a bomb of aliases": (BOMB, ":2: not YAML: got the alias *a0"), "a recursive alias": ("data: &a {train: *a}\n", ":1: not YAML: got the alias *a"),
    "a merge": ("optim: &a {lr: 1}\ntrain: {<<: *a}\n", ":2: not YAML: got the alias"), "deep lists": ("data: {train: " + "[" * 60_000, "not YAML"),
    "deep sections": ("optim:\n  lr: " + "{a: " * 12_000 + "1" + "}" * 12_000, "not YAML"), "two documents": ("{}\n---\n{}\n", ":2: not YAML"),
    "an object": ("optim:\n  lr: !!python/object/apply:os.system ['true']\n", ":2: optim.lr: could not determine a constructor"),
    "a target": ("optim:\n  _target_: os.system\n", "unknown option optim._target_"), "not UTF-8": (b"run: {name: \xff}\n", ":1: not YAML"),
    "a NUL": ("run: {name: a\0b}\n", "not YAML"), "a list": ("- run\n", ":1: got a sequence"), "a key that is a list": ("? [a, b]\n: 1\n",
    "got a sequence as a name"),
    "a folder": ("folder", "cannot be read (Is a directory)"),
    "no end": ("/dev/zero", "has more than 65,536 bytes"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, what):
    content, words = HOSTILE[what]
    path = tmp_path / "recipe.yaml"
    if content is None:
        path.write_bytes(b"run:\n  name: x\n" + b"# a comment\n" * 9_000_000)
    elif content in ("folder", "/dev/zero"):
        path = tmp_path if content == "folder" else content
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def refused() -> None:
        found = message([str(path)])
        assert words in found and len(found) < 2000, found

    held(refused, seconds=3.0, megabytes=100)


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "${oc.create:${oc.env:SECRET}}", "${nosuch:1}", "${run.name}", "x-${run.folder}",
                                  "[{path: '${oc.env:SECRET}'}]",
                                  "{'${oc.env:SECRET}': 1}"])
@pytest.mark.parametrize("key", ["run.name", "data.train", "data.format", "lora.rank_pattern", "optim.lr", "lora.targets", "run.folder"])
def test_nothing_is_filled_in_from_the_environment(recipe, monkeypatch, key, text):
    monkeypatch.setenv("SECRET", "canary-4711")
    found = message(recipe(f"{key}={text}"))
    assert f"command line: {key}" in found and "canary" not in found and "${" in found
