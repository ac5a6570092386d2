"""What a recipe will train on, before anything is trained: rows and their fates, what is wrong with them, and how a model reads them.

    python -m engine.audit recipes/quickstart.yaml
    python -m engine.audit RECIPE data.max_length=1024 --show 3
    python -m engine.audit RECIPE --html audit.html --strict

Reads data and tokenizer as training does, from the same cache; no weights. Exit code 2 where training would refuse the data.
"""

import argparse
import html
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import config, page
from engine.arguments import Parser, between
from engine.errors import run
from engine.page import Table

EXAMPLE = "python -m engine.audit recipes/quickstart.yaml data.max_length=64 --show 2"
VIEWED = 3  # documents of a source in the page, unless --show asks for more


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("audit", EXAMPLE, "Says what a recipe will train on and what is wrong with it. Takes what training takes: a recipe and key=value options.")
    parser.add_argument("recipe", nargs="*", metavar="RECIPE key=value", help=f"as for engine.train, whose --help lists the options [{config.DEFAULT_RECIPE}]")
    parser.add_argument("--show", type=between(int, 1), default=0, metavar="N", help="also print the first N documents of each source, token by token [0]")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page there too; it always lies in the run directory, audit/audit.html")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    args = parser.parse_intermixed_args(argv)
    if args.html and args.html.is_dir():
        parser.error(f"--html: got the folder {args.html}, expected a file")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    cfg = config.load(args.recipe)

    from engine import hub, rundir
    from engine.data import added_tokens, chat_template, checks, dataset, texts, view
    from engine.data.plan import Plan
    from engine.data.tokenizer import load_tokenizer
    from engine.models import weights
    from engine.publish import published

    base = hub.resolve(cfg.model.path, weights=False)
    words, family = added_tokens.extend(base.folder, cfg.model.add_tokens, Path(cfg.data.cache)), weights.read_config(base.folder)
    tokenizer = load_tokenizer(words)
    train, held_out = (dataset.load(cfg.data, of, tokenizer, cfg.train.seed, strict=False) for of in ("train", "validation"))
    chat_template.check(base.folder, cfg.data, tokenizer, train.first_row())
    plan = Plan(train.lengths, train.targets, cfg.data.max_length, cfg.train.global_batch, cfg.data.packing, cfg.data.shuffle, cfg.train.seed, cfg.train.epochs)
    datasets = {name: found for name, found in (("train", train), ("validation", held_out)) if found is not None}
    written = {name: texts.read(found, cfg.data, tokenizer) for name, found in datasets.items()}

    found = [*checks.misfit(train, held_out, tokenizer, family, len(cfg.model.add_tokens)), *checks.findings(train, held_out, cfg.data),
             *checks.padding(words, tokenizer, cfg.data), *merges(written["train"])]
    refused = any(one.severity == checks.ERROR for one in found)
    if args.strict:
        found = [replace(one, severity=checks.ERROR) if one.severity == checks.WARNING else one for one in found]
    order = (checks.ERROR, checks.WARNING, checks.NOTE)
    found.sort(key=lambda one: order.index(one.severity))
    run = rundir.choose(cfg)
    facts = {"recipe": " ".join(args.recipe) or config.DEFAULT_RECIPE, "model": str(base),
             **told(cfg, train, plan, checks.ends_kept(train) & checks.ends_learnt(train))}
    tables = [fates(datasets), lengths(train), scripts(written)]

    print("\n".join(f"{name:>10}  {text}" for name, text in facts.items()))
    for table in tables:
        print(f"\n{page.as_text(table)}")
    if args.show:
        print("\nrows as the model reads them, token by token; " + ("what is learnt is green" if sys.stdout.isatty() else "what is learnt stands in « »"))
        for one in view.views(train, tokenizer, args.show):
            print("\n" + view.as_text(one, sys.stdout.isatty()))
    print(f"\n{verdict(found, refused)}")
    for one in found:
        print("\n".join([f"  {one.severity:<7}  {one.kind}: {one.headline()}", f"{'':11}{one.advice}", *(f"{'':13}{row}" for row in one.rows)]))
    viewed = max(args.show, VIEWED)
    documents = [view.as_html(one) for one in view.views(train, tokenizer, viewed, view.LONGEST)]
    content = page.page(f"What {run.name} will train on", body(facts, tables, found, verdict(found, refused), documents))
    with published(run / "audit") as building:
        building.mkdir()
        (building / "audit.html").write_text(content, encoding="utf-8")
        if cfg.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(building / "tensorboard")) as events:
                events.add_text("rows", view.as_markdown(train, tokenizer, viewed), 0)
    if args.html:
        with published(args.html) as building:
            building.write_text(content, encoding="utf-8")
    print(f"\nas a page: {args.html or run / 'audit' / 'audit.html'}", flush=True)
    checks.refuse(found, "AUDIT")


def told(cfg: config.Recipe, train: Any, plan: Any, ends: Any) -> dict[str, str]:
    """What the run is, in the words of report.equation."""
    tokens, targets, kept = int(train.lengths.sum()), int(train.targets.sum()), int((train.times > 0).sum())
    learnt = {"answers": "every answer", "last": "the last answer", "all": "all text"}[cfg.data.supervise]
    filled = f", filled to {100 * plan.fill:.1f} %, {plan.padding:,} tokens of padding" if cfg.data.packing else ", each a row of its own"
    return {"rows": train.summary(),
            "template": cfg.data.template + (f", system prompt {cfg.data.system!r}" if cfg.data.system is not None else ""),
            "learnt": f"{learnt}: {targets:,} of {tokens:,} tokens ({100 * targets / tokens:.1f} %); the end of the last answer in "
                      f"{int(ends.sum()):,} of {kept:,} rows ({100 * ends.sum() / kept:.1f} %)",
            "epoch": f"{plan.sequences_per_epoch:,} sequences of up to {plan.max_length:,} tokens{filled}",
            "steps": f"{min(plan.num_steps, cfg.train.max_steps or plan.num_steps):,} ({plan.steps_per_epoch:,} an epoch)"}


def fates(datasets: dict[str, Any]) -> Table:
    """Rows by source and fate: records = unreadable + left out + kept."""
    from engine.data import ledger

    rows, columns = [], ("records", "rejected", "too_long", "no_target_left", "kept", "truncated", "split")
    for name, dataset in datasets.items():
        files = ledger.account(dataset)["files"]
        for number, source in enumerate(dataset.sources):
            mine, of = [file for file in files if file["source"] == source.name], dataset.source == number
            rows.append([f"{name}: {source.name}", *(f"{sum(file[column] for file in mine):,}" for column in columns), f"{of.sum():,}",
                         f"{dataset.lengths[of].sum():,}", f"{dataset.targets[of].sum():,}"])
    heads = ["source", "records", "unreadable", "too long", "no target left", "kept", "cut off", "split", "documents", "tokens", "learnt"]
    return Table("rows by source and fate", heads, rows)


def lengths(train: Any) -> Table:
    """Documents by their number of tokens, two classes for every doubling."""
    import numpy as np

    edges = np.array(sorted({1, 2, 3, *(2**power * half // 2 for power in range(2, 25) for half in (2, 3))}))
    which, first = np.searchsorted(edges, train.lengths), int(np.searchsorted(edges, train.lengths.min()))
    counts, tokens, targets = (np.bincount(which, weights=weights)[first:] for weights in (None, train.lengths, train.targets))
    lows = np.concatenate([[0], edges])[first:] + 1
    rows = [[f"{low:,}–{high:,}" if low < high else f"{high:,}", float(count / counts.max()), f"{count:,}", percent(size / tokens.sum()),
             percent(learnt / targets.sum())] for low, high, count, size, learnt in zip(lows, edges[first:], counts, tokens, targets, strict=False)]
    middle, high = np.percentile(train.lengths, [50, 95])
    return Table("documents by length", ["tokens", "", "documents", "of all tokens", "of the learnt"], rows,
                 f"median {middle:.0f}, 95 % up to {high:.0f}, longest {train.lengths.max():,}; data.max_length is {train.max_length:,}")


def scripts(written: dict[str, Any]) -> Table:
    """Shares of the characters in rows' messages, and rows by the script of most of their letters."""
    from engine.data.texts import KINDS

    first = next(iter(written.values()))
    there = [number for number in range(len(KINDS)) if any(one.characters[number] for one in written.values())]
    rows = [[KINDS[number], *([float(first.characters[number] / first.characters.max())]),
             *(cell for one in written.values() for cell in (percent(one.characters[number] / one.characters.sum()), f"{one.mainly[number]:,}"))]
            for number in sorted(there, key=lambda number: -first.characters[number])]
    return Table("characters of the messages", ["script", "", *(cell for name in written for cell in (name, "rows mainly"))], rows)


def merges(written: Any) -> list[Any]:
    from engine.data.checks import NOTE, Finding

    return [Finding("BOUNDARY", NOTE, written.merged, written.rows, "rows would get other tokens where question and answer meet, were both one text",
                    "nothing to do: here they are tokenised apart, in training as in generation, where servers too have nothing but the question",
                    tuple(written.named))] if written.merged else []


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def verdict(found: list[Any], refused: bool) -> str:
    counts = {name: sum(one.severity == name for one in found) for name in ("error", "warning", "note")}
    told = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)
    return ("training will refuse this data: " if refused else "training will take this data: ") + (told or "nothing to remark")


def body(facts: dict[str, str], tables: list[Table], found: list[Any], told: str, documents: list[str]) -> list[str]:
    """The parts of the page: what is wrong first, then figures, then rows."""
    listed = "".join(f'<li class="{one.severity}"><b>{one.severity} {one.kind}</b><p>{html.escape(f"{one.headline()}; {one.advice}.")}</p><ul>'
                     + "".join(f"<li>{html.escape(row)}</li>" for row in one.rows) + "</ul></li>" for one in found)
    known = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    worst = found[0].severity if found else "note"
    return [f'<p class="verdict {worst}">{html.escape(told)}</p>', f'<ul class="findings">{listed}</ul>' if found else "",
            f'<section class="facts"><h2>The run</h2><div><table>{known}</table></div></section>', *map(page.as_html, tables),
            '<section><h2>Rows as the model reads them</h2><p class="legend">The first of each source, token by token: <span>read</span> '
            '<span class="s">learnt</span> <span class="c">control token</span>. A small number: that many tokens share the bytes of one character. Ids show '
            'under the pointer.</p>',
            *documents, "</section>"]


if __name__ == "__main__":
    run(main)
