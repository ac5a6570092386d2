"""A rank that is much slower than the others, reported once: each waits for the slowest in every step, and nobody would know for whom."""

from statistics import median

from engine.distributed import World
from engine.errors import warn
from engine.metrics import Stopwatch

STEPS = 20  # over which times are added up
FACTOR = 2.0  # times the others' median
LOST_S = 0.5  # seconds that the others wait in so many steps, at least
PARTS = ("data", "forward")  # what a rank spends in them is its own; a backward and an optimizer step may wait for others


class Stragglers:
    """Ranks tell their own seconds of each step in the sums that they exchange anyway: each adds to a place that is its alone."""

    def __init__(self, world: World) -> None:
        self.world, self.told = world, world.size == 1
        self._begin()

    def _begin(self) -> None:
        self.steps, self.seconds = 0, [0.0] * self.world.size

    def own(self, watch: Stopwatch) -> list[float]:
        """What this rank adds to a step's sums."""
        return [0.0 if self.told or rank != self.world.rank else watch.spent(PARTS) for rank in range(self.world.size)]

    def noted(self, sums: list[float]) -> list[float]:
        """`sums` without the seconds of ranks, which are looked at."""
        *sums, seconds = *sums[: -self.world.size], sums[-self.world.size :]
        self.steps, self.seconds = self.steps + 1, [before + more for before, more in zip(self.seconds, seconds, strict=True)]
        if self.steps == STEPS:
            self._look()
            self._begin()
        return sums

    def _look(self) -> None:
        if self.told:
            return
        slowest = max(range(self.world.size), key=self.seconds.__getitem__)
        others = median(seconds for rank, seconds in enumerate(self.seconds) if rank != slowest)
        if self.seconds[slowest] < max(FACTOR * others, others + LOST_S):
            return
        self.told = True
        if self.world.is_first:
            each = ", ".join(f"rank {rank}: {1000 * seconds / STEPS:.0f}" for rank, seconds in enumerate(self.seconds))
            warn(f"rank {slowest} is slow, and the others wait for it in every step; own milliseconds a step, of data and forward, over "
                 f"{STEPS} steps: {each}; look at what else runs on its machine")
