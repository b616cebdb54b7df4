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
    # An iteration in which nothing was classified says nothing, and leaves the proportions as they are.
    spoke = samples.filter(pl.sum_horizontal(probability_columns(list(judged))[:-1]).sum().over("iteration") > 0)
    return _estimated(
        samples if spoke.is_empty() else spoke,
        list(judged),
        np.array([_solve(*pair) for pair in pairs]),
        lambda mean: _solve(mean, confusion),
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
    stops is a function of the samples. Where the shares are to be corrected, by `judged` texts or those of a `control`
    group's blocks, every corrected share has to be known to ± margin too, which takes more samples.
    """

    def __init__(
        self,
        rounds: Sequence[Sequence[Block]],
        domains: Sequence[str],
        margin: float | None,
        *,
        judged: Mapping[str, Matrix] | None = None,
        control: Sequence[Block] = (),
        seed: int = 0,
    ) -> None:
        self.rounds: int | None = None  # after how many the margin was met; None until then
        self._all = rounds
        self._margin = margin
        self._domains = domains
        self._judged = judged
        self._control = control
        self._seed = seed
        self._waiting: dict[Block, pl.DataFrame] = {}
        self._taken: list[pl.DataFrame] = []
        self._count = 0
        self._sums = np.zeros(len(domains))
        self._squares = np.zeros(len(domains))

    def take(self, block: Block, samples: pl.DataFrame) -> None:
        """Takes in a block's samples (columns iteration, p_<domain>, unclassified)."""
        if self._margin is None or self.rounds is not None:
            return
        self._waiting[block] = samples
        if self._control and self._judged is None:
            if not self._waiting.keys() >= {*self._control}:
                return
            self._judged = by_domain([self._waiting.pop(block) for block in self._control], self._domains)
        for blocks in self._all[len(self._taken) :]:
            if not self._waiting.keys() >= {*blocks}:
                return
            self._add(pl.concat([self._waiting.pop(block) for block in blocks]))
            if self.width() <= self._margin and self._corrected_width() <= self._margin:
                self.rounds = len(self._taken)
                return

    def _add(self, samples: pl.DataFrame) -> None:
        self._taken.append(samples)
        rows = _matrix(samples, self._domains)[:, :-1]
        self._count += len(rows)
        self._sums += rows.sum(axis=0)
        self._squares += (rows**2).sum(axis=0)

    def _corrected_width(self) -> float:
        """Half the widest interval that would be reported; 0 where nothing is corrected."""
        if self._judged is None or not self._sums.any():
            return 0.0
        found = corrected(pl.concat(self._taken), self._judged, self._seed)
        return max((share.high - share.low) / 2 for share in found.values())

    def width(self) -> float:
        """Half the widest 95 % interval over the domains, as classified; 1 while there are too few samples to say.

        A share that no sample spoke for is known to 3 / n (the rule of three), not to 0.
        """
        if self._count < FEWEST:
            return 1.0
        variances = np.maximum(self._squares / self._count - (self._sums / self._count) ** 2, 0.0)
        return float(max(NORMAL_95 * math.sqrt(variances.max() / self._count), 3 / self._count))


def samples_needed(margin: float, variance: float = 0.25) -> int:
    """Samples after which a share is known to ± margin (95 %); the variance of a probability is at most 1/4."""
    return max(FEWEST, math.ceil(variance * (NORMAL_95 / margin) ** 2), math.ceil(3 / margin))


def by_domain(control: Sequence[pl.DataFrame], domains: Sequence[str]) -> dict[str, Matrix]:
    """A control group's probabilities by the domain whose openings it continued: as many samples of each, in order."""
    return dict(zip(domains, np.split(_matrix(pl.concat(control), domains), len(domains)), strict=True))


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

    masses, _ = nnls(confusion.T, observed, maxiter=100 * len(confusion))
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
