"""How sure a mean is: its 95 % interval, from how many it is a mean of."""

import math

Z = 1.959964  # of 95 %


def wilson(mean: float, worth: float) -> tuple[float, float]:
    """Wilson's interval of a share, for as many yes-or-no questions as `worth`: it neither leaves
    [0, 1] nor shrinks to nothing when all are equal.
    """
    scale = Z * Z / worth
    middle = (mean + scale / 2) / (1 + scale)
    half = Z * math.sqrt(mean * (1 - mean) / worth + scale / (4 * worth)) / (1 + scale)
    return min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half))


def around(mean: float, num: float, std: float | None = None) -> tuple[float, float] | None:
    """The interval of a mean of `num` values; None where nothing can be said.

    Args:
        std: the values' deviation (divided by num). None: they are yes or no, or anything between,
            which is surer.
    """
    if not (math.isfinite(num) and math.isfinite(mean)) or num < 1:
        return None
    spread = mean * (1 - mean) if std is None else std * std
    if 0 <= mean <= 1 and spread <= mean * (1 - mean) + 1e-4:  # values within [0, 1]
        return wilson(mean, num * mean * (1 - mean) / spread if spread > 1e-12 else num)
    if std is None or num < 2 or not math.isfinite(std):
        return None
    error = Z * std / math.sqrt(num - 1)
    return mean - error, mean + error
