"""Texts → probabilities over the domains and unclassified mass; here by a linear probe.

A classifier is a callable: n texts → array (n, k + 1) of float64, one column per domain in the configuration's order,
the last one the mass outside all domains; rows sum to 1. The linear probe is a logistic regression on the mean of
static token embeddings, fitted on the text of the domains' own pools. It is kept as plain numbers, so that it is
fitted once per run and loaded everywhere else.
"""

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from vtmix.artifacts import Artefact, ClassifierReport, Inputs
from vtmix.errors import ConfigError, DetectionError, listing
from vtmix.settings import DomainName

Matrix = npt.NDArray[np.float64]

MIN_TEXTS = 10
CHARACTERS_PER_TOKEN = 4
BINS = 10
PROBE_SETTINGS = {
    "embedding": "wordllama l2_supercat_256, mean over tokens, unit length",
    "regression": "multinomial, L2, C = 10, classes balanced",
}
WEIGHTS_FILE = "weights/l2_supercat_256.safetensors"
TOKENIZER_FILE = "tokenizers/l2_supercat_tokenizer_config.json"


class Classifier(Protocol):
    """n texts → (n, k + 1): probabilities over the domains, then the unclassified mass; rows sum to 1."""

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Probabilities of n texts."""
        ...


class FittedProbe(Artefact):
    """A fitted linear probe (detection/classifier.json)."""

    domains: tuple[DomainName, ...]
    coefficients: Annotated[tuple[tuple[float, ...], ...], Field(description="per domain, per embedding dimension")]
    intercepts: Annotated[tuple[float, ...], Field(description="per domain")]
    report: Annotated[ClassifierReport, Field(description="measured on texts it was not fitted on")]


class LinearProbe:
    """A fitted probe and its embeddings, ready to classify."""

    def __init__(self, fitted: FittedProbe, embed: "StaticEmbedding | None" = None) -> None:
        self._coefficients = np.array(fitted.coefficients)
        self._intercepts = np.array(fitted.intercepts)
        self._embed = embed or StaticEmbedding()

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Probabilities (n, k + 1); a text with nothing to embed is wholly unclassified."""
        vectors = self._embed(texts)
        shares = _softmax(vectors @ self._coefficients.T + self._intercepts)
        unclassified = ~vectors.any(axis=1, keepdims=True)
        return np.hstack([np.where(unclassified, 0.0, shares), unclassified])


class StaticEmbedding:
    """The mean of a text's token embeddings, at unit length: 256 dimensions, from the files wordllama's wheel carries.

    The package itself is not imported: it asks a hub for the tokenizer it carries, and reconfigures logging.
    """

    def __init__(self) -> None:
        """Raises ConfigError when wordllama is not installed."""
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer  # type: ignore[import-untyped]

        folder = _wheel_folder("wordllama")
        self._table = load_file(folder / WEIGHTS_FILE)["embedding.weight"].astype(np.float32)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors (n, 256); zeros for a text with nothing to embed."""
        stripped = [text.strip() for text in texts]
        encodings = self._tokenizer.encode_batch(stripped, add_special_tokens=False)
        return np.array([self._embed(encoding.ids) for encoding in encodings]).reshape(len(texts), self._table.shape[1])

    def _embed(self, ids: list[int]) -> Matrix:
        if not ids:
            return np.zeros(self._table.shape[1])
        mean: Matrix = self._table[ids].mean(axis=0, dtype=np.float64)
        length = float(np.linalg.norm(mean))
        return mean / length if length else mean


def fit_probe(
    texts: Mapping[str, Sequence[str]], *, max_tokens: int, heldout: float, inputs: Inputs | None = None
) -> FittedProbe:
    """Fits a probe on the domains' texts, in pool order, and measures it on the first `heldout` share of each.

    Texts are cut to about the length of a generated sample, since short texts must be judged like short texts. Raises
    DetectionError naming every domain with fewer than MIN_TEXTS texts.
    """
    characters = max_tokens * CHARACTERS_PER_TOKEN
    cut = {domain: [text[:characters] for text in found if text.strip()] for domain, found in texts.items()}
    _refuse_scarce(cut)
    sizes = {domain: max(1, round(len(found) * heldout)) for domain, found in cut.items()}
    embed = StaticEmbedding()
    train = [embed(found[sizes[domain] :]) for domain, found in cut.items()]
    coefficients, intercepts = _regress(train)
    fitted = FittedProbe(
        inputs=inputs,
        domains=tuple(cut),
        coefficients=tuple(map(tuple, coefficients.tolist())),
        intercepts=tuple(intercepts.tolist()),
        report=ClassifierReport(
            kind="probe", heldout_texts=0, accuracy=0, macro_f1=0, calibration_error=0, confusion={}
        ),
    )
    probe = LinearProbe(fitted, embed)
    judged = {domain: probe(found[: sizes[domain]]) for domain, found in cut.items()}
    return fitted.model_copy(update={"report": measure("probe", judged)})


def measure(kind: str, judged: Mapping[str, Matrix]) -> ClassifierReport:
    """How well a classifier does on labelled text; `judged` holds, per true domain, its probabilities (n, k + 1)."""
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
            domain: dict(zip([*domains, "unclassified"], found.mean(axis=0).tolist(), strict=True))
            for domain, found in judged.items()
        },
    )


def _refuse_scarce(texts: Mapping[str, Sequence[str]]) -> None:
    scarce = [
        f"domain '{domain}' has {len(found)} texts to fit the classifier on, expected at least {MIN_TEXTS}: "
        "add samples to it, or raise pool.texts and rebuild its pool"
        for domain, found in texts.items()
        if len(found) < MIN_TEXTS
    ]
    if scarce:
        raise DetectionError(listing(scarce))


def _regress(vectors: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
    """Coefficients (k, d) and intercepts (k) of a balanced multinomial logistic regression; class j is vectors[j]."""
    from sklearn.linear_model import LogisticRegression

    width = vectors[0].shape[1]
    if len(vectors) == 1:
        return np.zeros((1, width)), np.zeros(1)
    labels = np.repeat(np.arange(len(vectors)), [len(found) for found in vectors])
    model: Any = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000, tol=1e-6)
    model.fit(np.vstack(vectors), labels)
    if len(vectors) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
        return np.vstack([np.zeros((1, width)), model.coef_]), np.array([0.0, model.intercept_[0]])
    return model.coef_, model.intercept_


def _softmax(logits: Matrix) -> Matrix:
    shares: Matrix = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _f1(guessed: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    hits = int((guessed & true).sum())
    return 2 * hits / int(guessed.sum() + true.sum())


def _calibration_error(confidence: Matrix, right: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: |confidence - accuracy| averaged over equal-width bins, weighted by their size."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def _wheel_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the linear probe needs {package}, which is not installed: pip install 'vtmix[train]'")
    return Path(spec.origin).parent
