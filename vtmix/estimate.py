"""From every sample's probabilities to the knowledge distribution and its error bars; pure.

Sums are exact before they are rounded once, so the order of the samples and the machine do not matter.
"""

import math
import statistics
from collections.abc import Sequence

import polars as pl

from vtmix.artifacts import DomainShare
from vtmix.errors import DetectionError
from vtmix.samples import UNCLASSIFIED

NORMAL_95 = 1.96


def shares(samples: pl.DataFrame, domains: Sequence[str]) -> dict[str, DomainShare]:
    """Each domain's share of the samples (columns iteration, p_<domain>), before renormalising."""
    iterations = samples.partition_by("iteration", maintain_order=True)
    return {domain: _share([part[f"p_{domain}"].to_list() for part in iterations]) for domain in domains}


def unclassified(samples: pl.DataFrame) -> float:
    """The mean mass outside the domains."""
    return _clip(_mean_of_means([part[UNCLASSIFIED].to_list() for part in samples.partition_by("iteration")]))


def distribution(found: dict[str, DomainShare]) -> dict[str, float]:
    """The shares, renormalised over the domains.

    Raises DetectionError when no mass fell on any domain.
    """
    total = math.fsum(share.mean for share in found.values())
    if not total:
        raise DetectionError("none of the samples was classified: there is nothing to estimate from")
    return {domain: share.mean / total for domain, share in found.items()}


def _share(iterations: Sequence[Sequence[float]]) -> DomainShare:
    """Mean of the iterations' means, its standard error over samples, its 95 % interval (normal approximation)."""
    mean = _mean_of_means(iterations)
    error = _standard_error([value for values in iterations for value in values])
    means = [_mean(values) for values in iterations]
    return DomainShare(
        mean=_clip(mean),
        standard_error=error,
        spread=statistics.stdev(means) if len(means) > 1 else 0.0,
        low=_clip(mean - NORMAL_95 * error),
        high=_clip(mean + NORMAL_95 * error),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_of_means(iterations: Sequence[Sequence[float]]) -> float:
    return _mean([_mean(values) for values in iterations])


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one, which says nothing about it."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
