"""Starts ranks, and leaves with the engine's exit codes: python -m engine.launch OPTIONS -m engine.train [ARGUMENT ...]

    --standalone [--nproc-per-node N] [--max-restarts N]     one node: node.py
    else torchrun's options                                  several: nodes.py, for torchrun by itself ends every failure with 1 and a page of text
"""

import signal
from argparse import REMAINDER

from engine import config, node
from engine.arguments import Parser, between
from engine.errors import DONE, PEER, PREEMPTED, EngineError, run

TRAIN = "engine.train"


def main(argv: list[str]) -> int:
    node.prepare()
    trains = TRAIN in argv
    if trains:
        config.load(argv[argv.index(TRAIN) + 1 :])  # a mistake in the recipe is reported once, and before torch takes its seconds
    if "--standalone" in argv:
        options = parser().parse_args(argv)
        ended = node.launched(options.module, options.nproc_per_node, options.max_restarts, trains)
    else:
        from engine import nodes  # it imports torch

        ended = nodes.launched(argv, trains)
    if ended.asked:
        return code_after(ended.asked, ended.codes)
    return first_cause(ended.failures) if ended.failures else DONE


def parser() -> Parser:
    """Of a launch on one node."""
    found = Parser("launch", "--standalone --nproc-per-node 2 -m engine.train recipes/quickstart.yaml", "Starts ranks on this node.")
    found.add_argument("--standalone", action="store_true")
    found.add_argument("--nproc-per-node", "--nproc_per_node", type=between(int, 1), default=1)
    found.add_argument("--max-restarts", "--max_restarts", type=between(int, 0), default=0)
    found.add_argument("-m", "--module", nargs=REMAINDER, required=True, metavar="MODULE [ARGUMENT ...]")
    return found


def first_cause(failures: list[tuple[int, int]]) -> int:
    """The exit code that tells most of `failures`, (rank, its exit code) in the order of time.

    A rank that left with PEER lost another. Later signals are the launcher's, sent to whoever was left, who may have obeyed with
    PREEMPTED, or, asked before, at once with 128 and more: none is a cause.
    """
    rank, code = failures[0]
    if code < 0:
        advice = ("if nobody sent it, memory ran out: lower train.micro_batch or data.max_length" if code == -signal.SIGKILL
                  else "its last words, if any, are above")
        raise EngineError("PEER-KILLED", f"rank {rank} was ended by {signal.Signals(-code).name}; {advice}", PEER)
    return next((later for _, later in failures if 0 < later < 128 and later not in (PEER, PREEMPTED)), code)


def code_after(signum: int, codes: list[int | None]) -> int:
    """The exit code of a launch that was told to stop by `signum`: the ranks' own if they had one to give."""
    if set(codes) == {DONE}:  # it came when the work was over
        return DONE
    if all(code == -signum for code in codes):  # it came before they could note it: there was nothing to save
        return PREEMPTED
    return next((code for code in codes if code is not None and code > 0 and code != PEER), PEER if PEER in codes else 128 + signum)


if __name__ == "__main__":
    run(main)
