"""Shares that sum to 1, and floors under them; pure."""

import math
from collections.abc import Mapping

from vtmix.errors import MixtureError

Shares = dict[str, float]


def normalise(masses: Mapping[str, float]) -> Shares:
    """Shares of a positive total that sum to 1.

    Scaled by the largest first: a sum of subnormals or of huge numbers would lose digits or overflow.
    """
    largest = max(masses.values())
    scaled = {name: mass / largest for name, mass in masses.items()}
    total = math.fsum(scaled.values())
    return {name: mass / total for name, mass in scaled.items()}


def lift(shares: Mapping[str, float], floor: float) -> Shares:
    """Raises every share to at least `floor`; the others give in proportion to their size.

    Raises MixtureError when the floors alone exceed 1.
    """
    if floor * len(shares) > 1 + 1e-12:
        raise MixtureError(f"floor {floor:g} times {len(shares)} domains exceeds 1: lower weights.floor")
    lifted: set[str] = set()
    result = dict(shares)
    while True:
        below = {name for name, share in result.items() if share < floor and name not in lifted}
        if not below:
            return result
        lifted |= below
        rest = {name: shares[name] for name in shares if name not in lifted}
        if not rest:
            return dict.fromkeys(shares, 1 / len(shares))
        room = 1 - floor * len(lifted)
        result = {name: floor for name in shares if name in lifted} | {
            name: share * room for name, share in normalise(rest).items()
        }
        result = {name: result[name] for name in shares}
