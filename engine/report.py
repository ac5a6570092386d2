"""What a run reports to its user: the plan as an equation before the first step, and at the end what came of it."""

import sys
from pathlib import Path
from typing import Any

from torch import nn

from engine.config import Lora, Recipe
from engine.data.dataset import Dataset
from engine.data.plan import Plan
from engine.distributed import World
from engine.evaluate import Report
from engine.export import Agreement
from engine.hub import Base


def facts(model: nn.Module, world: World, choices: dict[str, str]) -> dict[str, Any]:
    """What the run computes and on what, for the console and run.json; `choices` say what was chosen and why."""
    return {"device": str(world.device.type), "ranks": world.size, "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad), **choices}


def _trained(cfg: Lora) -> str:
    if cfg.start:
        return f"LoRA as in {cfg.start}"
    name = ("PiSSA" if cfg.init == "pissa" else "LoRA") + " with DoRA" * cfg.dora + " with rsLoRA" * cfg.rslora
    return f"{name}, rank {cfg.rank} on {', '.join(cfg.targets)}{', and '.join(['', *cfg.modules_to_save])}" if cfg.rank else "all weights"


def equation(run: Path, cfg: Recipe, base: Base, plan: Plan, rows: Dataset, num_steps: int, start: int, ranks: int, known: dict[str, Any]) -> str:
    """The run's plan as a few aligned lines."""
    kind = _trained(cfg.lora)
    last = plan.sequences_per_epoch % cfg.train.global_batch
    targets = int(rows.targets.sum())
    lines = {
        "run": f"{run}" + (f", resumed after step {start}" if start else ""),
        "model": f"{base}, {known['parameters']:,} parameters, {known['trained']:,} trained "
                 f"({100 * known['trained'] / known['parameters']:.2f} %): {kind}",
        "precision": known["precision"],
        "attention": known["attention"],
        "optimizer": known["optimizer"],
        **({"GPU": f"utilisation {known['utilisation']}"} if known["device"] == "cuda" else {}),
        "rows": rows.summary(),
        "epoch": f"{plan.sequences_per_epoch:,} sequences of up to {plan.max_length:,} tokens, {int(rows.lengths.sum()):,} tokens, {targets:,} supervised"
                 + (f", filled to {100 * plan.fill:.1f} %, {plan.padding:,} tokens of padding" if cfg.data.packing else ""),
        "step": batch(cfg.train.global_batch, cfg.train.micro_batch, ranks) + (f"; {last} in the last step of an epoch" if last else ""),
        "steps": f"{num_steps:,} ({plan.steps_per_epoch:,} an epoch)",
    }
    return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())


def batch(sequences: int, micro_batch: int, ranks: int) -> str:
    """A step's sequences, as ranks take them: `plan.share` weighs their cost, so one rank may take more of them than another."""
    accumulation = -(-sequences // (micro_batch * ranks))
    shares = f"{sequences / ranks:g} on average, shared by cost" if ranks > 1 else f"{sequences}"
    return (f"global batch {sequences} sequences = ranks {ranks} × {shares}, in micro-batches of at most {micro_batch}: "
            f"accumulation {'about ' * (ranks > 1)}{accumulation}")


def samples(judged: Report | None) -> str:
    """Each sampled question as the model reads it, its answer, and the row's own."""
    return "\n".join(f"{indented(sample.question, '  > ')}\n{indented(sample.answer, '    ')}\n    (expected: {sample.expected.strip()})"
                     for sample in (judged.samples if judged else []))


def indented(text: str, margin: str) -> str:
    return "\n".join(margin + line for line in text.splitlines() if line.strip())


def closing(run: Path, judged: Report | None, exported: dict[Path, Agreement], frozen_digest: str | None) -> str:
    """Exact matches per task, sample answers, and the commands to try next. `frozen_digest`: of weights as they were before."""
    lines = [""]
    if judged:
        lines.append(f"validation loss {judged.loss:.4f}, perplexity {judged.scalars['validation/perplexity']:.2f}")
        if judged.tasks:
            lines += ["exact matches on held-out rows:", judged.table()]
        if judged.samples:
            lines += ["sample answers:", samples(judged)]
    if frozen_digest:
        lines.append(f"base weights: every bit as before training (SHA-256 {frozen_digest[:16]}…)")
    lines += [f"{path}: read back and compared with the trained model over {found.tokens:,} tokens: KL {found.kl:.1e} nats a token, "
              f"largest logit difference {found.max_abs_logit:.1e}, same likeliest token after {100 * found.top1:.2f} %" for path, found in exported.items()]
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python.name
    lines += ["next:", f"  {python} -m tensorboard.main --logdir {run / 'tensorboard'}"]
    lines += [f"  {python} -m engine.generate --{path.name} {path}          # a chat; --prompt TEXT for one answer"
              for path in exported if path.name in ("model", "adapter")]
    return "\n".join(lines)
