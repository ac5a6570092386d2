"""A rank that is much slower than the others, reported once: each waits for the slowest in every step, and nobody would know for whom."""

from collections.abc import Collection
from statistics import median

from engine.data.loader import MicroBatch
from engine.distributed import World
from engine.errors import warn
from engine.metrics import Stopwatch

STEPS = 20  # over which times are added up
FACTOR = 2.0  # times what its work takes by the others' median
LOST_S = 0.5  # seconds that the others wait in so many steps, at least
PARTS = ("data", "forward")  # what a rank spends in them is its own; a backward and an optimizer step may wait for others


class Stragglers:
    """Ranks tell their own seconds and tokens of each step in the sums that they exchange anyway: each adds to places that are its alone."""

    def __init__(self, world: World) -> None:
        self.world, self.told = world, world.size == 1
        self._begin()

    def _begin(self) -> None:
        self.steps, self.spent = 0, [0.0] * (2 * self.world.size)

    def own(self, watch: Stopwatch, batches: Collection[MicroBatch]) -> list[float]:
        """What this rank adds to a step's sums: (2 × ranks), seconds of each, then tokens of each."""
        own = [0.0] * len(self.spent)
        if not self.told:
            own[self.world.rank] = watch.spent(PARTS)
            own[self.world.size + self.world.rank] = sum(sum(batch.lengths) for batch in batches)
        return own

    def noted(self, sums: list[float]) -> list[float]:
        """`sums` without what ranks have told, which is looked at."""
        *sums, spent = *sums[: -len(self.spent)], sums[-len(self.spent) :]
        self.steps, self.spent = self.steps + 1, [before + more for before, more in zip(self.spent, spent, strict=True)]
        if self.steps == STEPS:
            self._look()
            self._begin()
        return sums

    def _look(self) -> None:
        if self.told:
            return
        seconds, tokens = self.spent[: self.world.size], self.spent[self.world.size :]
        slowest = max(range(self.world.size), key=seconds.__getitem__)
        # Less work makes no less time: a rank may have fewer tokens because its documents are long.
        rates = [one / min(work, tokens[slowest]) for rank, (one, work) in enumerate(zip(seconds, tokens, strict=True))
                 if rank != slowest and 2 * work >= tokens[slowest]]
        if not rates:  # it alone has so much to do
            return
        expected = tokens[slowest] * median(rates)
        if seconds[slowest] < max(FACTOR * expected, expected + LOST_S):
            return
        self.told = True
        if self.world.is_first:
            each = ", ".join(f"rank {rank}: {1000 * one / STEPS:.0f}" for rank, one in enumerate(seconds))
            warn(f"rank {slowest} is slow, and the others wait for it in every step; own milliseconds a step, of data and forward, over "
                 f"{STEPS} steps: {each}; look at what else runs on its machine")
