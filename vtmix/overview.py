"""A plan in words: what an epoch takes from every domain, how much of its pool was seen, and what has changed."""

from collections.abc import Iterator, Sequence

from vtmix.artifacts import DomainPlan, Plan

HEADINGS = ("domain", "weight", "samples", "share", "tokens", "share", "MiB", "passes", "seen")
MIB = 1 << 20


def overview(plan: Plan, before: Plan | None, first: Plan | None) -> Iterator[str]:
    """A line about the epoch and a table of its domains, given the plans of the epoch before and of the first one.

    Shares are of the epoch; passes are over the domain's pool; `seen` is the share of the pool that was drawn at least
    once by the end of the epoch. In brackets stands the difference from the epoch before.
    """
    rows = [HEADINGS, *(_row(name, plan, before, first) for name in plan.domains), _total(plan, before)]
    unit = "" if plan.unit == "samples" else f", weights are shares of {plan.unit.replace('_', ' ')}"
    yield f"epoch {plan.epoch}: {plan.samples:,} samples in {plan.shards:,} shards{unit}"
    if before is not None:
        yield f"in brackets: the difference from epoch {before.epoch}"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  " + "  ".join(_aligned(cell, width, number) for number, (cell, width) in enumerate(cells))


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _row(name: str, plan: Plan, before: Plan | None, first: Plan | None) -> Sequence[str]:
    domain = plan.domains[name]
    old = before.domains.get(name) if before else None
    tokens = sum(found.tokens or 0 for found in plan.domains.values())
    return (
        name,
        f"{domain.weight:.4f}{_moved(domain.weight - old.weight, '+.4f') if old else ''}",
        f"{domain.count:,}{_moved(domain.count - old.count, '+,d') if old else ''}",
        f"{domain.count / plan.samples:.2%}",
        _shown(domain.tokens, ",d"),
        _shown(domain.tokens / tokens if domain.tokens is not None and tokens else None, ".2%"),
        _shown(domain.bytes / MIB if domain.bytes is not None else None, ",.1f"),
        f"{domain.passes:.2f}",
        f"{_seen(domain, first.domains.get(name) if first else None):.1%}",
    )


def _total(plan: Plan, before: Plan | None) -> Sequence[str]:
    domains = plan.domains.values()
    tokens = sum(found.tokens or 0 for found in domains)
    moved = _moved(plan.samples - before.samples, "+,d") if before else ""
    size = sum(found.bytes or 0 for found in domains)
    return ("all", "1", f"{plan.samples:,}{moved}", "100%", f"{tokens:,}", "100%", f"{size / MIB:,.1f}", "", "")


def _seen(domain: DomainPlan, first: DomainPlan | None) -> float:
    """Without a repetition within a pass, what was drawn from the run's first position on is what was seen."""
    start = first.position if first else domain.position
    drawn = domain.position + domain.count - start
    return min(1.0, drawn / domain.pool_samples) if domain.pool_samples else 0.0


def _moved(difference: float, form: str) -> str:
    return f" ({difference:{form}})"


def _shown(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)
