"""Knowledge distributions that the authors of the paper published, for runs that do not detect their own.

Counts out of about 10,000 samples, from the authors' repository; Figure 4 of the paper (arXiv 2411.11266) shows other
numbers. They are something to try inputs with, and say nothing about a model of your own: whatever is made from them
carries the label.
"""

from vtmix.errors import ConfigError
from vtmix.settings import PublishedName

DOMAINS = ("law", "medicine", "finance", "science", "code", "other")
COUNTS: dict[PublishedName, tuple[int, ...]] = {
    "llama-2-7b": (571, 866, 653, 595, 813, 6489),
    "llama-2-13b": (563, 784, 664, 608, 951, 6414),
    "llama-3-8b": (194, 648, 289, 748, 5552, 2558),
    "qwen-1.5-7b": (532, 813, 506, 2083, 2740, 2953),
    "qwen-2-7b": (855, 669, 347, 862, 3327, 1998),
    "qwen-2.5-7b": (299, 490, 357, 738, 5006, 1968),
    "qwen-2.5-14b": (195, 354, 358, 874, 5542, 1504),
}


def label(name: PublishedName) -> str:
    """What every artefact made from a published distribution says of it."""
    return f"published for {name} by the paper's authors, not detected"


def distribution(name: PublishedName, domains: tuple[str, ...]) -> dict[str, float]:
    """The published shares of a model, in the order of `domains`.

    Raises ConfigError when the domains are not those of the paper.
    """
    if set(domains) != set(DOMAINS):
        raise ConfigError(
            f"detection.published '{name}' speaks of the domains {', '.join(DOMAINS)}, found {', '.join(domains)}: "
            "name the domains alike, or leave it out and detect your own"
        )
    counts = dict(zip(DOMAINS, COUNTS[name], strict=True))
    return {domain: counts[domain] / sum(counts.values()) for domain in domains}
