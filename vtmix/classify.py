"""Texts → probabilities over the domains and unclassified mass, and how well that is done on labelled text.

A classifier is a callable: n texts → array (n, k + 1) of float64, one column per domain in the configuration's order,
the last one the mass outside all domains; rows sum to 1. Whatever its kind, it is measured on labelled texts of the
domains' own pools before it judges a sample, and every one of these judgements is kept beside the samples
(detection/heldout.parquet: domain, text, p_<domain>…, unclassified; `text` is the text's place in the domain's pool).
"""

import io
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field

from vtmix import commit
from vtmix.artifacts import Artefact, ClassifierReport
from vtmix.errors import DamageError, MissingError
from vtmix.samples import UNCLASSIFIED, are_probabilities, probability_columns
from vtmix.settings import DomainName

Matrix = npt.NDArray[np.float64]
Judged = Mapping[str, Matrix]
"""Per true domain, the probabilities (n, k + 1) a classifier gave its labelled texts."""

BINS = 10
CHARACTERS_PER_TOKEN = 4


class Classifier(Protocol):
    """n texts → (n, k + 1): probabilities over the domains, then the unclassified mass; rows sum to 1.

    A blank text is wholly unclassified.
    """

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Probabilities of n texts."""
        ...


def sound(judged: Matrix) -> Matrix:
    """Probabilities (n, k + 1) as a classifier gave them, with rows that are none, of infinities say, unclassified."""
    rows = judged.copy()
    odd = ~are_probabilities(rows)
    rows[odd, :-1], rows[odd, -1] = 0.0, 1.0
    return rows


class MeasuredClassifier(Artefact):
    """A run's classifier (detection/classifier.json): what it is made from, and what it is worth."""

    domains: tuple[DomainName, ...]
    report: Annotated[ClassifierReport, Field(description="measured on texts it was not fitted on")]


def blank(text: str) -> bool:
    """Whether a text shows nothing: whitespace, control and format characters, and U+FFFD, which stands for bytes that
    are no character.
    """
    return all(one == "\ufffd" or one.isspace() or unicodedata.category(one) in ("Cc", "Cf") for one in text)


def cut(texts: Mapping[str, Sequence[str]], max_tokens: int) -> dict[str, list[str]]:
    """Labelled texts of about the length of a sample, since short texts are harder to judge; none that is blank."""
    characters = max_tokens * CHARACTERS_PER_TOKEN
    shown = {domain: [text[:characters] for text in found] for domain, found in texts.items()}
    return {domain: [text for text in found if not blank(text)] for domain, found in shown.items()}


def measure(kind: str, judged: Judged) -> ClassifierReport:
    """How well a classifier does on labelled text."""
    domains = list(judged)
    rows = np.vstack(list(judged.values()))
    truth = np.repeat(np.arange(len(domains)), [len(found) for found in judged.values()])
    shares = rows[:, :-1]
    guess = np.where(rows[:, -1] > shares.max(axis=1), -1, shares.argmax(axis=1))
    return ClassifierReport(
        kind=kind,
        heldout_texts=len(rows),
        accuracy=float((guess == truth).mean()),
        macro_f1=statistics.fmean(_f1(guess == number, truth == number) for number in range(len(domains))),
        calibration_error=_calibration_error(shares.max(axis=1), guess == truth),
        confusion={
            domain: dict(zip([*domains, UNCLASSIFIED], found.mean(axis=0).tolist(), strict=True))
            for domain, found in judged.items()
        },
    )


def publish_judged(path: Path, judged: Judged) -> None:
    """Writes the judgements of labelled texts as Parquet; they count once classifier.json is committed after them."""
    columns = probability_columns(list(judged))
    frames = [
        pl.DataFrame({"domain": [domain] * len(rows), "text": range(len(rows))}).hstack(
            pl.DataFrame(rows, schema=columns)
        )
        for domain, rows in judged.items()
    ]
    content = io.BytesIO()
    pl.concat(frames).write_parquet(content)
    path.unlink(missing_ok=True)  # left by a run that was ended before it committed classifier.json
    commit.publish_file(path, content.getvalue())


def read_judged(path: Path, domains: Sequence[str]) -> dict[str, Matrix]:
    """The judgements of labelled texts, per true domain.

    Raises MissingError or DamageError when they are not there, or not those of these domains.
    """
    remedy = "delete detection/classifier.json beside it and run again: both are made anew"
    try:
        frame = pl.read_parquet(path)
        found = {
            domain: frame.filter(pl.col("domain") == domain).select(probability_columns(domains)).to_numpy()
            for domain in domains
        }
    except FileNotFoundError:
        raise MissingError(f"{path}: not found: {remedy}") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DamageError(f"{path}: {str(error).splitlines()[0]}: {remedy}") from None
    if any(not len(rows) or not are_probabilities(rows).all() for rows in found.values()):
        raise DamageError(f"{path}: does not hold each domain's probabilities: {remedy}")
    return found


def _f1(guessed: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    hits = int((guessed & true).sum())
    return 2 * hits / int(guessed.sum() + true.sum())


def _calibration_error(confidence: Matrix, right: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: |confidence - accuracy| averaged over equal-width bins, weighted by their size."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))
