"""Charts as files: SVG, PNG or PDF by the name's ending. Equal data gives equal files."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtmix.errors import ConfigError

Series = Mapping[str, Sequence[float]]
COLUMNS = 3
STYLES = ("-", "--", ":", "-.")
"""Of lines one after the other: where two coincide, both are seen."""
FORMATS = (".svg", ".png", ".pdf")


def require_format(path: Path) -> None:
    """Raises ConfigError for a name whose ending is no format of a chart."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a chart's name ends in {', '.join(FORMATS)}")


def lines(path: Path, panels: Mapping[str, Series], *, x: str, y: str, start: int = 1) -> None:
    """One panel per title, with a line per name; the values of a line stand at start, start + 1, …"""
    figure, axes = _panels(len(panels))
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for (name, values), style in zip(series.items(), itertools.cycle(STYLES), strict=False):
            axis.plot(range(start, start + len(values)), values, style, marker="o", markersize=3, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    _save(figure, path)


def radar(path: Path, series: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """One closed line per name over the spokes that all have in common, as in Fig. 5 of the paper."""
    from matplotlib.figure import Figure

    spokes = list(next(iter(series.values())))
    angles = [2 * math.pi * number / len(spokes) for number in range(len(spokes))]
    figure = Figure(figsize=(6, 6), layout="constrained")
    axis: Any = figure.add_subplot(projection="polar")
    for (name, values), style in zip(series.items(), itertools.cycle(STYLES), strict=False):
        found = [values[spoke] for spoke in spokes]
        axis.plot([*angles, angles[0]], [*found, found[0]], style, marker="o", markersize=3, label=name)
    # Not from 0 on: shares of a loss differ by a few hundredths.
    drawn = [value for values in series.values() for value in values.values()]
    least, most = min(drawn), max(drawn)
    margin = (most - least) / 4 or 0.01
    axis.set_ylim(least - margin, most + margin)
    axis.set_rlabel_position(180 / len(spokes))
    axis.tick_params(axis="x", pad=12)
    axis.set_xticks(angles, spokes)
    axis.set_title(title, fontsize=10, pad=20)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    require_format(path)
    # Without the time of day and random names, which are what matplotlib would tell equal charts apart by.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    with mpl.rc_context({"svg.hashsalt": "vtmix", "svg.fonttype": "none"}):
        figure.savefig(path, metadata=metadata)
