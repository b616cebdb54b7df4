"""Samples of a detection, for a person to judge the classifier by."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from vtmix.errors import DamageError, MissingError
from vtmix.published import label
from vtmix.samples import CONTROL, UNCLASSIFIED, probability_columns
from vtmix.settings import PublishedName

CHARACTERS = 300


def show(folder: Path, domains: Sequence[str], count: int, published: PublishedName | None = None) -> Iterator[str]:
    """Lines that show, per domain, the first `count` samples that are most likely of it, and those of none.

    The first are as good as any: samples are independent. Raises MissingError when no sample is committed yet, or none
    ever will be since the distribution is a published one.
    """
    files = [
        path for path in folder.glob("iteration-*/part-*.parquet") if path.parent.name != f"iteration-{CONTROL:02d}"
    ]
    if not files and published:
        raise MissingError(
            f"{folder} holds no samples: the distribution is {label(published)}. To draw some of your model's, remove "
            "detection.published and run `vtmix detect` in another run folder (--run)"
        )
    if not files:
        raise MissingError(f"{folder} holds no samples yet: run `vtmix detect` first")
    columns = probability_columns(domains)
    names = dict(zip(columns, [*domains, UNCLASSIFIED], strict=True))
    try:
        samples = pl.read_parquet(sorted(files), columns=["iteration", "sample", "text", *columns])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DamageError(f"{folder}: {str(error).splitlines()[0]}: `vtmix detect` names what is damaged") from None
    rows = samples.select(columns).to_numpy()
    best = pl.Series(rows.argmax(axis=1))
    for place, column in enumerate(columns):
        found = samples.filter(best == place)
        yield f"{names[column]}: the likeliest of {len(found):,} samples ({len(found) / len(samples):.1%})"
        for row in found.head(count).iter_rows(named=True):
            shares = sorted(((row[other], names[other]) for other in columns), reverse=True)
            said = ", ".join(f"{name} {share:.2f}" for share, name in shares if share >= 0.005)
            yield f"  [{row['iteration']}/{row['sample']}] {said}"
            yield f"    {_printable(row['text'])}"


def _printable(text: str) -> str:
    """A text on one line, cut, without what would move a terminal's cursor."""
    line = " ".join(text.split())
    cut = line[:CHARACTERS] + ("…" if len(line) > CHARACTERS else "")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in cut)
