"""From every sample's probabilities to the knowledge distribution and its error bars; pure.

The raw shares are the mean probabilities. The corrected shares p solve Cᵀp = q, where q are the raw ones and row j of C
the mean probabilities that the classifier gave labelled texts of domain j: adjusted counts (Gart and Buck 1966), also
known as black-box shift estimation (Lipton, Wang and Smola 2018), here as least squares with p ≥ 0, then normalised.

Intervals are percentile bootstraps: groups of consecutive samples are drawn with replacement, and for the corrected
shares groups of labelled texts too, since C is an estimate as well.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from vtmix.artifacts import DomainShare
from vtmix.errors import DetectionError
from vtmix.samples import UNCLASSIFIED, Block, probability_columns

Matrix = npt.NDArray[np.float64]

NORMAL_95 = 1.96
GROUPS = 256
RESAMPLES = 1000
FEWEST = 1000
"""Samples below which nothing stops early: a margin that is looked at often is met by luck where samples are few."""


def shares(samples: pl.DataFrame, domains: Sequence[str], seed: int = 0) -> dict[str, DomainShare]:
    """Each domain's mean probability over the samples (columns iteration, p_<domain>, unclassified)."""
    return _estimated(samples, domains, _resampled(samples, domains, seed)[:, :-1], lambda mean: mean[:-1])


def corrected(samples: pl.DataFrame, judged: Mapping[str, Matrix], seed: int = 0) -> dict[str, DomainShare]:
    """Each domain's share corrected by the confusion of labelled texts (per true domain, n_j x (k + 1)); sums to 1.

    Raises DetectionError when no mass fell on any domain.
    """
    confusion = np.array([rows.mean(axis=0) for rows in judged.values()])
    rng = np.random.Generator(np.random.Philox(key=seed + 1))
    confusions = np.stack([_bootstrap(rows, rng) for rows in judged.values()], axis=1)
    means = _resampled(samples, list(judged), seed)
    classified = means[:, :-1].any(axis=1)  # where samples are few, one drawn again may hold none that says anything
    pairs = zip(means[classified], confusions[classified], strict=True)
    return _estimated(
        samples, list(judged), np.array([_solve(*pair) for pair in pairs]), lambda mean: _solve(mean, confusion)
    )


def unclassified(samples: pl.DataFrame) -> float:
    """The mean mass outside the domains."""
    return _mean(samples[UNCLASSIFIED].to_list())


def distribution(found: Mapping[str, DomainShare]) -> dict[str, float]:
    """The shares, renormalised over the domains.

    Raises DetectionError when no mass fell on any domain.
    """
    total = math.fsum(share.mean for share in found.values())
    if not total:
        raise DetectionError("none of the samples was classified: there is nothing to estimate from")
    return {domain: share.mean / total for domain, share in found.items()}


class EarlyStop:
    """Looks at samples as they come, round by round, until every domain's share is known to ± margin.

    A round is a block of every iteration. Rounds count in order, in whatever order their blocks come, so where it
    stops is a function of the samples. It keeps sums, and rows only of rounds that are not complete.
    """

    def __init__(self, rounds: Sequence[Sequence[Block]], domains: Sequence[str], margin: float | None) -> None:
        self.rounds: int | None = None  # after how many the margin was met; None until then
        self._all = rounds
        self._margin = margin
        self._columns = probability_columns(domains)[:-1]
        self._waiting: dict[Block, Matrix] = {}
        self._complete = 0
        self._count = 0
        self._sums = np.zeros(len(domains))
        self._squares = np.zeros(len(domains))

    def take(self, block: Block, samples: pl.DataFrame) -> None:
        """Takes in a block's samples."""
        if self._margin is None:
            return
        self._waiting[block] = samples.select(self._columns).to_numpy()
        while self.rounds is None and self._complete < len(self._all):
            blocks = self._all[self._complete]
            if any(block not in self._waiting for block in blocks):
                return
            for rows in map(self._waiting.pop, blocks):
                self._count += len(rows)
                self._sums += rows.sum(axis=0)
                self._squares += (rows**2).sum(axis=0)
            self._complete += 1
            if self.width() <= self._margin:
                self.rounds = self._complete

    def width(self) -> float:
        """Half the widest 95 % interval over the domains; 1 while there are too few samples to say.

        A share that no sample spoke for is known to 3 / n (the rule of three), not to 0.
        """
        if self._count < FEWEST:
            return 1.0
        variances = np.maximum(self._squares / self._count - (self._sums / self._count) ** 2, 0.0)
        return float(max(NORMAL_95 * math.sqrt(variances.max() / self._count), 3 / self._count))


def samples_needed(margin: float, variance: float = 0.25) -> int:
    """Samples after which a share is known to ± margin (95 %); the variance of a probability is at most 1/4."""
    return max(FEWEST, math.ceil(variance * (NORMAL_95 / margin) ** 2), math.ceil(3 / margin))


def _estimated(
    samples: pl.DataFrame, domains: Sequence[str], resampled: Matrix, estimator: Callable[[Matrix], Matrix]
) -> dict[str, DomainShare]:
    """Estimates with standard errors and intervals; `resampled` holds the bootstrap's estimates (b, k)."""
    by_iteration = [estimator(_means(part, domains)) for part in samples.partition_by("iteration", maintain_order=True)]
    spreads = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in zip(*by_iteration, strict=True)]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {
        domain: DomainShare(
            mean=_clip(mean),
            standard_error=float(error),
            spread=float(spread),
            low=_clip(min(bottom, mean)),
            high=_clip(max(top, mean)),
        )
        for domain, mean, error, spread, bottom, top in zip(
            domains, estimator(_means(samples, domains)), resampled.std(axis=0), spreads, low, high, strict=True
        )
    }


def _resampled(samples: pl.DataFrame, domains: Sequence[str], seed: int) -> Matrix:
    """The bootstrap's mean probabilities (b, k + 1)."""
    return _bootstrap(_matrix(samples, domains), np.random.Generator(np.random.Philox(key=seed)))


def _bootstrap(rows: Matrix, rng: np.random.Generator) -> Matrix:
    """Means of `rows` (n, c) with groups of consecutive rows drawn with replacement: (RESAMPLES, c)."""
    groups = np.array_split(rows, min(GROUPS, len(rows)))
    sums = np.array([group.sum(axis=0) for group in groups])
    sizes = np.array([len(group) for group in groups])
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=RESAMPLES)
    means: Matrix = (drawn @ sums) / (drawn @ sizes)[:, None]
    return means


def _solve(observed: Matrix, confusion: Matrix) -> Matrix:
    """p ≥ 0, summing to 1, with confusionᵀ p proportional to the observed masses in the least-squares sense."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    masses, _ = nnls(confusion.T, observed)
    total = masses.sum()
    if not total:
        raise DetectionError("none of the samples was classified: there is nothing to estimate from")
    solved: Matrix = masses / total
    return solved


def _means(samples: pl.DataFrame, domains: Sequence[str]) -> Matrix:
    """Mean probabilities (k + 1), by exact sums: the order of the samples does not matter."""
    return np.array([_mean(samples[column].to_list()) for column in probability_columns(domains)])


def _matrix(samples: pl.DataFrame, domains: Sequence[str]) -> Matrix:
    return samples.select(probability_columns(domains)).to_numpy()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _clip(value: float) -> float:
    return float(min(max(value, 0.0), 1.0))
