"""How many examples Hypothesis draws: all in the whole suite, a fifth of them while working."""

share = 1.0  # conftest.py says it


def some(count: int) -> int:
    """Of `count` examples as many as this run draws."""
    return max(5, round(share * count))
