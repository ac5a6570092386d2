"""Python's collector of garbage, which looks through all that modules have left in memory again and again while they load, and finds none."""

import gc

_AS_STARTED = gc.get_threshold()


def rest() -> None:
    """It looks seldom. For a command's start, a quarter of which it takes with torch and torch's compiler."""
    gc.set_threshold(100_000)


def resume() -> None:
    """It looks as often as Python has it, and not through what is there now: in a loop whose ranks wait for each other each look would hold up all."""
    gc.freeze()
    gc.set_threshold(*_AS_STARTED)
