"""The architecture, held by reading the sources: who may import whom, who may touch the environment, how long train.py is."""

import ast
from pathlib import Path

from conftest import ROOT

ENGINE = ROOT / "engine"
# A module imports from lower floors, or from its own package. Commands stand on top and nothing imports them.
FLOORS = [
    {"terminal", "collector", "transfer"},
    {"errors", "tensorfile"},
    {"hub", "watchdog"},
    {"config", "arguments", "publish", "page", "finding"},
    {"distributed", "dropout", "linear", "signals", "record", "events", "space", "varlen_attention"},
    {"precision", "loss", "cpu_attention", "fused_attention", "adamw_bf16", "node"},
    {"attention", "nodes"},
    {"models", "lora", "data"},
    {"metrics", "optim", "checkpoint", "sampling", "gguf_in", "adapter"},
    {"gguf_out", "restarts", "saver", "memory", "gpus"},
    {"evaluate", "export", "rundir", "blackbox", "stragglers"},
    {"report", "machine"},
    {"plain"},
    {"train", "generate", "convert", "audit", "plan", "doctor", "bench", "launch"},
    {"verify", "replay"},  # they run train
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def sources() -> list[tuple[str, Path, ast.Module]]:
    return [(path.relative_to(ENGINE).parts[0].removesuffix(".py"), path, ast.parse(path.read_text(encoding="utf-8")))
            for path in sorted(ENGINE.rglob("*.py")) if path != ENGINE / "__init__.py"]


def imports(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module != "engine" else [f"engine.{name.name}" for name in node.names]
    return found


def test_modules_import_from_lower_floors_only():
    for name, path, tree in sources():
        assert name in LEVEL, f"{path.name} has no floor yet: place {name} in FLOORS"
        for imported in (other.split(".")[1] for other in imports(tree) if other.startswith("engine.")):
            if imported in LEVEL:
                assert imported == name or LEVEL[imported] < LEVEL[name], f"{path.relative_to(ROOT)} imports {imported}, which is not below it"


def test_one_file_talks_to_other_ranks_and_few_read_the_environment():
    for name, path, tree in sources():
        if name not in ("distributed", "nodes"):  # which is torchrun itself and no rank
            assert not [other for other in imports(tree) if other.startswith("torch.distributed")], f"{path.name} imports torch.distributed"
        touched = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")]
        assert not touched or name in ("distributed", "errors", "node", "nodes"), f"{path.name} reads the environment"


def test_no_pickle_and_no_trainer():
    for name, path, tree in sources():
        for banned in ("pickle", "transformers", "peft", "accelerate", "datasets"):
            assert not [other for other in imports(tree) if other.split(".")[0] == banned], f"{path.name} imports {banned}"
        named = {node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)}
        if name != "bench":  # which no other module may import: it measures the engine against them, in processes of their own
            assert not named & {"pickle", "transformers", "peft", "accelerate", "datasets"}, f"{path.name} may import {named}"
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "eval", "exec"}, f"{path.name} calls {calls & {'torch.load', 'torch.save', 'eval', 'exec'}}"


def test_the_loop_can_be_read_in_one_sitting():
    lines = (ENGINE / "train.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200, f"train.py has {len(lines)} lines; move a concern into the module it belongs to"


def test_config_needs_no_torch():
    for name in ("config", "errors", "hub"):
        assert not [other for other in imports(ast.parse((ENGINE / f"{name}.py").read_text())) if other.startswith("torch")]


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the `kernels` package that transformers looks for when its Llama is imported"
