"""Reproduces a black box: trains from its checkpoint to its step, in a scratch folder, and compares every number to the bit.

    python -m engine.replay runs/NAME/blackbox/step-000000010

It runs engine.train with the run's own recipe on as many ranks, from where the run was started, so that paths mean the same.
"""

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine import config
from engine.arguments import Parser
from engine.errors import BUG, CHECKPOINT, DONE, NUMERIC, USER, EngineError, last, run

EXAMPLE = "python -m engine.replay runs/quickstart/blackbox/step-000000010"
OPTIONS = (*config.WITHOUT_EXTRAS, "checkpoint.every_steps=0", "checkpoint.each_epoch=false")
TOLD = 10  # tokens in the table


def main(argv: list[str]) -> int:
    parser = Parser("replay", EXAMPLE, "Trains from a black box's checkpoint to its step again, on as many ranks, and compares losses, gradient norms and "
                    "every token's loss to the bit. Run it where the run was started. Exit code 0; 70 with what differs; 3 where data or weights have "
                    "changed. Leaves nothing behind.")
    parser.add_argument("box", type=Path, metavar="BLACKBOX", help="a folder runs/NAME/blackbox/step-…")
    box = parser.parse_args(argv).box
    recorded, before, plan, tokens = opened(box)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    print(plan, flush=True)
    with tempfile.TemporaryDirectory(prefix=".replay-", dir=box.parent) as folder:
        again = train(box, recorded, before, Path(folder).resolve())
    print(tokens)
    if differs := differences(recorded, again):
        more = f" (and {len(differs) - 5} more)" if len(differs) > 5 else ""
        raise EngineError("REPLAY-DIFFERS", f"{box}: not reproduced: {'; '.join(differs[:5])}{more}: another machine, number of threads or torch rounds "
                          "otherwise (a warning says so), else what happened was no function of the recipe: look at the hardware", BUG)
    print("reproduced bit for bit")
    return DONE


def opened(box: Path) -> tuple[dict[str, Any], dict[str, Any], str, str]:
    """blackbox.json and run.json of a black box, and in words what will be done and which tokens were worst.

    Raises:
        EngineError: it is no black box, or not whole, or a newer one has its checkpoint.
    """
    try:
        recorded, before = (json.loads((box / name).read_text(encoding="utf-8")) for name in ("blackbox.json", "run.json"))
        checkpoint, size, threads = recorded["checkpoint"], recorded["world_size"], recorded["threads"]
        plan = (f"step {recorded['step']:d}: {recorded['kind']}; again from {'the start' if checkpoint is None else f'step {checkpoint:d}'} "
                f"on {size:d} rank{'s' * (size > 1)} of {threads:d} thread{'s' * (threads > 1)}")
        if recorded["format"] != 1 or min(recorded["step"], size, threads) < 1 or not {"began"} <= recorded.keys() or not isinstance(before, dict):
            raise ValueError("expected what engine.blackbox writes")
        if checkpoint is not None and not (box / "checkpoint").is_dir():
            raise EngineError("REPLAY-CHECKPOINT", f"{box}: its checkpoint has gone, as only the newest black box of a run keeps one; replay that", USER)
        for name in ("recipe.yaml", *([] if checkpoint is None else [f"checkpoint/step-{checkpoint:09d}"])):
            (box / name).stat()
        return recorded, before, plan, table(recorded)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"without {error}" if isinstance(error, KeyError) else error
        raise EngineError("REPLAY-BOX", f"{box}: cannot be read as a black box: {what}; give one as it was left; example: {EXAMPLE}", USER) from error


def train(box: Path, recorded: dict[str, Any], before: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The black box reproduced, by engine.train in `folder`."""
    import torch

    from engine import blackbox, distributed
    from engine import train as training

    run_again = folder / "run"
    run_again.mkdir()
    shutil.copy2(box / "run.json", run_again)  # the base's commit, and what the run was computed with
    if recorded["checkpoint"]:
        shutil.copytree(box / "checkpoint", run_again / "checkpoints", copy_function=blackbox.link)
    blackbox.Recorder.wanted = recorded["step"]
    torch.set_num_threads(1)  # here, where a pool of threads would not outlive a fork
    arguments = [str(box / "recipe.yaml"), *OPTIONS, f"run.folder={json.dumps(str(folder))}", "run.name=run"]
    codes = distributed.fork_ranks(recorded["world_size"], lambda _: training.main(arguments), folder / "log", recorded["threads"])
    sys.stderr.writelines(line + "\n" for line in (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("WARNING"))
    now = json.loads((run_again / "run.json").read_text(encoding="utf-8"))
    if changed := [f"{name}: {before.get(name)} → {now.get(name)}" for name in config.CONTENT if before.get(name) != now.get(name)]:
        raise EngineError("REPLAY-CHANGED", f"{box}: cannot be reproduced: {'; '.join(changed)}; put back what the run had", CHECKPOINT)
    made = run_again / "blackbox" / f"step-{recorded['step']:09d}" / "blackbox.json"
    if not made.exists():
        error = last(run_again)
        if error is None or error.exit_code == NUMERIC:
            raise EngineError("REPLAY-DIFFERS", f"{box}: not reproduced: the run came to its end without step {recorded['step']}, with exit codes {codes}: "
                              f"{error}", BUG)
        raise error
    again = json.loads(made.read_text(encoding="utf-8"))
    if recorded["checkpoint"] is None and (changed := differences(recorded["began"], again["began"])):
        raise EngineError("REPLAY-CHANGED", f"{box}: cannot be reproduced: at the start the weights' bits add up to {changed[0]}; put back what the run had",
                          CHECKPOINT)
    return again


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two black boxes differ, each as name: before → again. Numbers are written so that equal text is equal bits."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if key not in ("checkpoint", "began")]
        return [text for key in keys for text in differences(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [text for i, (a, b) in enumerate(zip(one, other, strict=True)) for text in differences(a, b, f"{name}[{i}]")]
    return [] if json.dumps(one) == json.dumps(other) else [f"{name}: {str(one)[:60]} → {str(other)[:60]}"]


def table(box: dict[str, Any]) -> str:
    """The tokens with the largest loss, those that are not finite first."""
    tokens = [(rank, one["row"], *token) for rank, batches in enumerate(box["ranks"]) for batch in batches for one in batch["documents"]
              for token in one["learnt"]]
    tokens.sort(key=lambda token: -token[5] if isinstance(token[5], float) else -float("inf"))
    lines = [f"loss {box['loss']}, gradient norm {box['gradient_norm']}; gradients not finite in {len(box['not_finite'])} of {len(box['modules'])} modules "
             f"{', '.join(box['not_finite'][:2])}",
             f"{'loss':>12}  {'rank':>4}  {'position':>8}  {'token':<16}  row"]
    lines += [f"{loss if isinstance(loss, str) else f'{loss:.4f}':>12}  {rank:>4}  {at:>8}  {token:<16}  {row}"
              for rank, row, at, _, token, loss in tokens[:TOLD]]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
