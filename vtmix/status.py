"""What a run has come to, read from its artefacts: one row per epoch and domain."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from vtmix.artifacts import Losses, Plan, RunFolder, Weights

DASH = "–"


@dataclass(frozen=True)
class Row:
    """One domain in one epoch; None where it is not known (yet)."""

    epoch: int
    domain: str
    weight: float | None = None
    count: int | None = None
    passes: float | None = None
    loss: float | None = None
    potential: float | None = None
    forgetting: float | None = None


def rows(run: RunFolder, domains: list[str], epochs: int) -> Iterator[Row]:
    """Rows for the base model (epoch 0) and every epoch that has begun.

    Loss, learnable potential and forgetting degree of a row are those measured after its epoch: they lead to the
    weights of the next.
    """
    for epoch in range(epochs + 1):
        weights = Weights.read(run.weights(epoch), "") if run.weights(epoch).exists() else None
        plan = Plan.read(run.plan(epoch), "") if run.plan(epoch).exists() else None
        losses = Losses.read(run.losses(epoch), "") if run.losses(epoch).exists() else None
        signals = _signals(run, epoch, losses)
        if weights is None and losses is None:
            continue
        for domain in domains:
            potential, forgetting = signals.get(domain, (None, None))
            yield Row(
                epoch=epoch,
                domain=domain,
                weight=weights.weights.get(domain) if weights else None,
                count=plan.domains[domain].count if plan else None,
                passes=plan.domains[domain].passes if plan else None,
                loss=losses.domains[domain].per_token if losses else None,
                potential=potential,
                forgetting=forgetting,
            )


def _signals(run: RunFolder, epoch: int, losses: Losses | None) -> dict[str, tuple[float | None, float | None]]:
    """Learnable potential and forgetting degree after an epoch, by the same arithmetic that moves the weights."""
    from vtmix.artifacts import Reference
    from vtmix.signals import make_signals, unit_of

    if losses is None:
        return {}
    before = Losses.read(run.losses(epoch - 1), "") if epoch and run.losses(epoch - 1).exists() else None
    reference = Reference.read(run.reference, "") if run.reference.exists() else None
    signals = make_signals(losses, before, reference, unit_of(losses, reference))
    return {
        name: (
            signal.potential if signal.reference is not None else None,
            signal.forgetting if signal.previous is not None else None,
        )
        for name, signal in signals.items()
    }


def table(found: list[Row]) -> Table:
    """The rows as a table for people."""
    view = Table(title="weight and count went in; loss, γ and φ came out", title_justify="left", title_style="dim")
    for heading in ("epoch", "domain", "weight", "count", "passes", "eval loss", "potential γ", "forgetting φ"):
        view.add_column(heading, justify="left" if heading == "domain" else "right")
    for number, row in enumerate(found):
        last = number + 1 == len(found) or found[number + 1].epoch != row.epoch
        view.add_row(
            "base" if row.epoch == 0 else str(row.epoch),
            row.domain,
            _shown(row.weight, ".4f"),
            _shown(row.count, ",d"),
            _shown(row.passes, ".3f"),
            _shown(row.loss, ".4f"),
            _shown(row.potential, ".4f"),
            _shown(row.forgetting, ".4f"),
            end_section=last,
        )
    return view


def _shown(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)
