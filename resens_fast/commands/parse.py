"""Small values on the command line: ranges of k, channel statistics, image sizes; one sentence for each mistake."""

from __future__ import annotations

from ..errors import DataError, SweepError


def counts(text: str, option: str, least: int = 1) -> list[int]:
    """The numbers that `1:20`, `2:20:2`, `5` or `1,2,5:8` stand for; ranges include both ends.

    Raises SweepError, naming the option and the part of its value that is wrong.
    """
    found: list[int] = []
    for piece in text.split(","):
        try:
            numbers = [int(part) for part in piece.split(":")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3:
            raise SweepError(f"{option} {text!r} is not a number or a range: write 10, 1:20, 2:20:2 or 1,2,5")
        first, last, step = (numbers[0], numbers[-1], 1) if len(numbers) < 3 else numbers
        if step < 1:
            raise SweepError(f"{option} {text!r} has the step {step}: a step is 1 or more")
        if last < first:
            raise SweepError(f"{option} {text!r} is empty: {last} is below {first}, write {last}:{first}")
        if first < least:
            why = "k is 1 or more, the intact network is always evaluated" if least else "it must be 0 or more"
            raise SweepError(f"{option} {text!r} starts at {first}: {why}")
        found += range(first, last + 1, step)
    return list(dict.fromkeys(found))


def statistics(text: str | None, option: str) -> tuple[float, ...] | None:
    """One number per channel, separated by commas; None for None.  Raises DataError for anything else."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(
            f"{option} {text!r} is not a list of numbers: write one per channel, such as 0.5,0.5,0.5"
        ) from None
    if option == "--std" and min(values) <= 0:
        raise DataError(f"{option} {text!r} has a value that is not positive: a standard deviation is above 0")
    return values


def image_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from `224` or `224x192`; None for None.  Raises DataError for anything else."""
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise DataError(f"--image-size {text!r} is not a size: write 224 or 224x192")
    return sides[0], sides[-1]
