"""What a run will take before it is started: memory, time, disk.

    python -m engine.plan recipes/quickstart.yaml
    python -m engine.plan recipes/llama2_7b_lora.yaml --ranks 8 --gpu A100 --memory 80

Memory is that of a step rehearsed without content (engine/memory.py), so it needs neither weights nor the GPU that is planned for; rows,
tokenizer and config.json are read as training reads them. Time is arithmetic: FLOP of the rows over FLOP/s of the device. Exit code 4
where the recipe's step does not fit.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import config
from engine.arguments import Parser, between
from engine.errors import DONE, ENVIRONMENT, EngineError, run

EXAMPLE = "python -m engine.plan recipes/llama2_7b_lora.yaml --ranks 8 --gpu A100 --memory 80"
GIB = 2**30
SHARES = (0.2, 0.4, 0.6)  # of a device's FLOP/s, put to use
LOOKED_AT = 2000  # steps of an epoch, spread over it, among which the largest micro-batch is looked for

Sequence = tuple[list[int], int]  # tokens of its documents, padding included, and its supervised tokens
Setting = tuple[int, int]  # train.activation_checkpointing, train.micro_batch


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("plan", EXAMPLE, "Memory, time and disk that a run will take. Takes what training takes: a recipe and key=value options.")
    parser.add_argument("recipe", nargs="*", metavar="RECIPE key=value", help=f"as for engine.train, whose --help lists the options [{config.DEFAULT_RECIPE}]")
    parser.add_argument("--ranks", type=between(int, 1), metavar="N", help="processes, over all nodes [one for each GPU here, else two]")
    parser.add_argument("--gpu", metavar="NAME", help="plan for GPUs of that name, such as H100, which need not be here [what is here]")
    parser.add_argument("--memory", type=between(float, 0.001), metavar="GIB", help="of a GPU, or of this machine where ranks are on its CPU [what is here]")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    cfg = config.load(args.recipe)

    from engine import hub, space
    from engine.data import added_tokens, dataset
    from engine.data.plan import Plan
    from engine.data.tokenizer import load_tokenizer
    from engine.memory import Rehearsal
    from engine.models import weights

    base = hub.resolve(cfg.model.path, weights=False)
    tokenizer = load_tokenizer(added_tokens.extend(base.folder, cfg.model.add_tokens, Path(cfg.data.cache)))
    rows, held_out = (dataset.load(cfg.data, of, tokenizer, cfg.train.seed) for of in ("train", "validation"))
    dataset.check_fit(rows, held_out, tokenizer, weights.read_config(base.folder), len(cfg.model.add_tokens))
    plan = Plan(rows.lengths, rows.targets, cfg.data.max_length, cfg.train.global_batch, cfg.data.packing, cfg.data.shuffle, cfg.train.seed,
                cfg.train.epochs, rows.skipped)

    place = place_of(args, cfg.train.device)
    rehearsal = Rehearsal(cfg, base.folder, (tokenizer.size - len(cfg.model.add_tokens), tokenizer.size), place.device, place.ranks)
    copy, largest, own = space.of_checkpoint(rehearsal.kept.values()), largest_first(plan), (cfg.train.activation_checkpointing, cfg.train.micro_batch)
    held, fitting = {}, []
    for recompute, count in shown(settings(own, -(-cfg.train.global_batch // place.ranks))):
        accumulates = count * place.ranks < cfg.train.global_batch
        # More than what does not fit does not either, but for one rank's whole step at once, which finds no gradients there.
        if (accumulates or place.ranks > 1) and any(one not in fitting and one[0] == recompute and one[1] < count for one in held):
            continue
        held[recompute, count] = rehearsal.step(shape_of(largest[:count]), recompute, accumulates)
        if place.fits(held[recompute, count].peak, copy):
            fitting.append((recompute, count))

    print("\n".join(f"{name:>10}  {text}".rstrip() for name, text in {
        **what(cfg, plan, rehearsal, str(base), place), **memory(held[own], copy, shape_of(largest[: own[1]]), place)}.items()))
    print(f"\n{table(held, fitting)}\n")
    print("\n".join(f"{name:>10}  {text}" for name, text in beside(cfg, plan, rows, rehearsal, copy, place).items()))
    if own not in fitting:
        raise EngineError("PLAN-MEMORY", advice(place.taken(held[own].peak, copy), place, fitting), ENVIRONMENT)
    return DONE


# ---- On what ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """`sharing` ranks share `room` bytes and `speed` FLOP/s: those of a GPU one has alone, those of a CPU all, where each also takes
    `process` bytes for code and libraries. None: not known."""

    device: Any
    ranks: int
    sharing: int
    process: int
    room: int | None
    speed: float | None
    told: str

    def taken(self, peak: int, copy: int) -> int:
        """Of the room: what its ranks hold, and on a CPU rank 0's copy of a checkpoint."""
        return (peak + self.process) * self.sharing + copy * (self.device.type == "cpu")

    def fits(self, peak: int, copy: int) -> bool:
        return self.room is None or self.taken(peak, copy) <= self.room


def place_of(args: argparse.Namespace, wanted: str) -> Place:
    """What is asked for, else what is here. `wanted`: train.device."""
    import torch

    from engine import gpus, machine, metrics

    here, asked = gpus.count() if wanted != "cpu" else 0, int(args.memory * GIB) if args.memory else None
    if not (args.gpu or here or wanted == "cuda"):
        cpu, room, ranks = torch.device("cpu"), asked or machine.room()[1], args.ranks or 2
        (speed, source), process = metrics.peak_flops(cpu), int(metrics.memory(cpu)["memory/peak_rss_mb"] * 2**20)
        return Place(cpu, ranks, ranks, process, room, speed, f"{ranks} ranks on one CPU with {size(room)}; its FLOP/s: {source}")
    name, ranks = args.gpu or (torch.cuda.get_device_name() if here else "GPU"), args.ranks or max(1, here)
    room, speed = asked or (torch.cuda.get_device_properties(0).total_memory if here and not args.gpu else None), metrics.named_peak(name)
    if args.gpu and speed is None:
        raise EngineError("PLAN-GPU", f"--gpu: got {name}, expected a name that has one of engine/metrics.py's PEAK_FLOPS in it")
    known = f"with {size(room)}" if room else "(--memory says of what size)"
    return Place(torch.device("cuda"), ranks, 1, 0, room, speed, f"{ranks} ranks, each on one {name} {known}")


# ---- What is rehearsed -----------------------------------------------------------------------------------------------


def largest_first(plan: Any) -> list[Sequence]:
    """Sequences of an epoch by tokens, then supervised ones: no micro-batch takes more than the first of them together."""
    return sorted(_sequences(plan), key=lambda one: (-sum(one[0]), -one[1]))


def _sequences(plan: Any) -> Iterator[Sequence]:
    for number in range(0, plan.steps_per_epoch, -(-plan.steps_per_epoch // LOOKED_AT)):
        step, first = plan.step(number), 0
        for sequence in step.sequences:
            part = slice(first, first := first + len(sequence))
            lengths = step.lengths[part].tolist()
            yield [length for length in [*lengths, max(step.fill_to - sum(lengths), 0)] if length], int(step.targets[part].sum())


def shape_of(sequences: list[Sequence]) -> Any:
    from engine.memory import Shape

    documents, targets = zip(*sequences, strict=True)
    return Shape([length for lengths in documents for length in lengths], [sum(lengths) for lengths in documents], sum(targets))


def settings(own: Setting, share: int) -> list[Setting]:
    """The recipe's, then all others: micro-batches of powers of two up to a rank's `share` of a step, with and without recomputation."""
    powers = [1 << power for power in range(share.bit_length())]
    return list(dict.fromkeys([own, *((recompute, count) for recompute in sorted({0, 1, own[0]}) for count in sorted({*powers, own[1]}))]))


def shown(items: list[Setting]) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc="rehearsing", unit=" steps", leave=False, disable=not sys.stderr.isatty())


# ---- What is said ----------------------------------------------------------------------------------------------------


def what(cfg: config.Recipe, plan: Any, rehearsal: Any, base: str, place: Place) -> dict[str, str]:
    from engine.report import batch

    parameters, trained = (sum(one.numel() for one in some) for some in (rehearsal.model.parameters(), rehearsal.trained.values()))
    return {"model": f"{base}, {parameters:,} parameters, {trained:,} trained ({100 * trained / parameters:.2f} %)", "on": place.told,
            "step": batch(cfg.train.global_batch, cfg.train.micro_batch, place.ranks),
            "steps": f"{_steps(cfg, plan):,} ({plan.steps_per_epoch:,} an epoch)"}


def memory(held: Any, copy: int, shape: Any, place: Place) -> dict[str, str]:
    taken = place.taken(held.peak, copy)
    whole = "" if place.device.type == "cuda" else f"; with {size(place.process)} of code and libraries, and the host's copy, {place.ranks} ranks {size(taken)}"
    if place.room is not None:
        fits = "left for" if taken <= place.room else "too little, without"
        whole += f"; {size(abs(place.room - taken))} {fits} what no tensor shows"
    return {"": "", "memory": f"of a rank in a step, micro-batches of up to {len(shape.sequences)} sequences with {sum(shape.documents):,} tokens, "
                              f"{shape.targets:,} of them supervised",
            **{name: f"{size(getattr(held, name)):>12}" for name in ("frozen", "trained", "gradients", "moments", "passing")},
            "peak": f"{size(held.peak):>12}  in its {held.part}{whole}"}


def table(held: dict[Setting, Any], fitting: list[Setting]) -> str:
    """Peaks by micro-batch and recomputation; what does not fit in parentheses, and a line for more than that."""
    rows, columns = (sorted(set(values)) for values in zip(*held, strict=True))
    cells = {one: size(held[one].peak) if one in fitting else f"({size(held[one].peak)})" for one in held}
    lines = [f"{'a rank with train.micro_batch':>38} " + "".join(f"{count:>14}" for count in columns)]
    for recompute in rows:
        lines.append(f"{f'train.activation_checkpointing={recompute}':>38} " + "".join(f"{cells.get((recompute, count), '–'):>14}" for count in columns))
    return "\n".join(lines)


def beside(cfg: config.Recipe, plan: Any, rows: Any, rehearsal: Any, copy: int, place: Place) -> dict[str, str]:
    """Time, disk and the host's memory. `copy`: bytes of a checkpoint."""
    from engine import space
    from engine.metrics import Flops

    steps, folder = _steps(cfg, plan), Path(cfg.run.folder).absolute()
    flop = Flops(rehearsal.model).of(int(rows.lengths.sum()), int(rows.targets.sum()), rows.lengths) * steps / plan.steps_per_epoch
    devices = place.ranks // place.sharing
    times = [f"{clock(flop / (share * place.speed * devices))} at {100 * share:.0f} %" for share in SHARES] if place.speed else ["FLOP/s are not known"]
    count = space.copies(cfg.checkpoint, bool(cfg.data.validation) + (cfg.log.spike_z > 0), 0, 0, steps, plan.steps_per_epoch)
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return {"time": f"{flop:.3g} FLOP: {', '.join(times)}" + (f" of {place.speed * devices / 1e12:,.4g} TFLOP/s" if place.speed else "")
                    + "; evaluations and recomputation not counted",
            "disk": f"{count} checkpoints of {size(copy)} at once at most, exports of {size(space.of_export(rehearsal.model, cfg.export))}; in "
                    f"{cfg.run.folder} {space.told(there)}",
            "host": f"{size(copy)} of rank 0's memory for the copy of a checkpoint that is being written"}


def advice(needed: int, place: Place, fitting: list[Setting]) -> str:
    """Recomputation takes about a third more time, small micro-batches much less: of what fits, that with the least of both."""
    wrong = f"a step takes {size(needed)}, expected at most {size(place.room or 0)}; "
    if not fitting:
        return wrong + "no micro-batch fits: lower data.max_length, train adapters (lora.rank), or set optim.name=adamw_bf16 or optim.shard=true"
    recompute, count = min(fitting, key=lambda one: (one[0] != 0, one[0], -one[1]))
    return wrong + f"train.micro_batch={count} train.activation_checkpointing={recompute} fits"


def size(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= 10 * GIB else f"{count / 2**20:,.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def clock(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _steps(cfg: config.Recipe, plan: Any) -> int:
    return min(plan.num_steps, cfg.train.max_steps or plan.num_steps)


if __name__ == "__main__":
    run(main)
