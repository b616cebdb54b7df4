"""The linear probe: a logistic regression on static embeddings, fitted on the text of the domains' own pools.

An embedding is the mean of a text's token vectors, so a text costs microseconds. The fitted probe is plain numbers:
fitted once per run, committed, and loaded by every worker. Every labelled text is also judged by a fit that has not
seen it (cross-validation); these judgements measure the probe, set its temperature, and are what a correction of the
knowledge distribution rests on.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from vtmix.artifacts import Inputs
from vtmix.classify import Judged, Matrix, MeasuredClassifier, blank, cut, measure
from vtmix.errors import ConfigError, DetectionError, listing

MIN_TEXTS = 10
TEMPERATURES = (0.05, 20.0)
SETTINGS = {
    "embedding": "wordllama l2_supercat_256, mean over tokens, unit length",
    "regression": "multinomial, L2, C = 10, classes balanced",
}
WEIGHTS_FILE = "weights/l2_supercat_256.safetensors"
TOKENIZER_FILE = "tokenizers/l2_supercat_tokenizer_config.json"


class FittedProbe(MeasuredClassifier):
    """A fitted linear probe (detection/classifier.json)."""

    coefficients: Annotated[tuple[tuple[float, ...], ...], Field(description="per domain, per embedding dimension")]
    intercepts: Annotated[tuple[float, ...], Field(description="per domain")]
    temperature: Annotated[float, Field(gt=0, description="the logits are divided by it, so that it is calibrated")]


class LinearProbe:
    """A fitted probe and its embeddings, ready to classify."""

    def __init__(self, fitted: FittedProbe) -> None:
        self._coefficients = np.array(fitted.coefficients) / fitted.temperature
        self._intercepts = np.array(fitted.intercepts) / fitted.temperature
        self._embed = StaticEmbedding()

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Probabilities (n, k + 1); a text with nothing to embed is wholly unclassified."""
        vectors = self._embed(texts)
        return _probabilities(vectors, vectors @ self._coefficients.T + self._intercepts)


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
        """Unit vectors (n, 256); zeros for a text with nothing to embed, as for every blank one."""
        shown = ["" if blank(text) else text.strip() for text in texts]
        encodings = self._tokenizer.encode_batch(shown, add_special_tokens=False)
        return np.array([self._embed(encoding.ids) for encoding in encodings]).reshape(len(texts), self._table.shape[1])

    def _embed(self, ids: list[int]) -> Matrix:
        if not ids:
            return np.zeros(self._table.shape[1])
        mean: Matrix = self._table[ids].mean(axis=0, dtype=np.float64)
        length = float(np.linalg.norm(mean))
        return mean / length if length else mean


def fit_probe(
    texts: Mapping[str, Sequence[str]], *, max_tokens: int, folds: int, inputs: Inputs | None = None
) -> tuple[FittedProbe, Judged]:
    """A probe fitted on all texts of the domains, and the texts' probabilities by fits that had not seen them.

    Fold f holds every folds-th text of each domain. Raises DetectionError naming every domain with fewer than
    MIN_TEXTS texts, or fewer than there are folds.
    """
    found = cut(texts, max_tokens)
    _refuse_scarce(found, max(MIN_TEXTS, folds))
    embed = StaticEmbedding()
    vectors = [embed(of_domain) for of_domain in found.values()]
    regression = _Regression()
    coefficients, intercepts = regression.fit(vectors)
    unseen = _unseen_logits(vectors, folds, regression)
    temperature = _temperature(unseen)
    judged = {
        domain: _probabilities(embedded, logits / temperature)
        for domain, embedded, logits in zip(found, vectors, unseen, strict=True)
    }
    fitted = FittedProbe(
        inputs=inputs,
        domains=tuple(found),
        report=measure("probe", judged),
        coefficients=tuple(map(tuple, coefficients.tolist())),
        intercepts=tuple(intercepts.tolist()),
        temperature=temperature,
    )
    return fitted, judged


def _refuse_scarce(texts: Mapping[str, Sequence[str]], least: int) -> None:
    scarce = [
        f"domain '{domain}' has {len(found)} texts to fit the classifier on, expected at least {least}: "
        "add samples to it, or raise pool.texts and rebuild its pool"
        for domain, found in texts.items()
        if len(found) < least
    ]
    if scarce:
        raise DetectionError(listing(scarce))


def _unseen_logits(vectors: Sequence[Matrix], folds: int, regression: "_Regression") -> list[Matrix]:
    """Per class, every text's logits (n, k) by the regression that was fitted without its fold."""
    logits = [np.zeros((len(found), len(vectors))) for found in vectors]
    for fold in range(folds):
        coefficients, intercepts = regression.fit([np.delete(found, np.s_[fold::folds], axis=0) for found in vectors])
        for place, found in zip(logits, vectors, strict=True):
            place[fold::folds] = found[fold::folds] @ coefficients.T + intercepts
    return logits


class _Regression:
    """A balanced multinomial logistic regression. Each fit starts where the last one ended: the optimum is one."""

    def __init__(self) -> None:
        from sklearn.linear_model import LogisticRegression

        self._model: Any = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000, tol=1e-4, warm_start=True)

    def fit(self, vectors: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
        """Coefficients (k, d) and intercepts (k); class j is vectors[j]."""
        width = vectors[0].shape[1]
        if len(vectors) == 1:
            return np.zeros((1, width)), np.zeros(1)
        labels = np.repeat(np.arange(len(vectors)), [len(found) for found in vectors])
        self._model.fit(np.vstack(vectors), labels)
        coefficients, intercepts = self._model.coef_.copy(), self._model.intercept_.copy()
        if len(vectors) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
            return np.vstack([np.zeros((1, width)), coefficients]), np.array([0.0, intercepts[0]])
        return coefficients, intercepts


def _temperature(logits: Sequence[Matrix]) -> float:
    """What the logits are to be divided by (Guo et al. 2017): minimises the cross-entropy, every domain counting alike.

    The targets are Platt's (1999), (n + 1) / (n + k) for the true domain, so that a domain without a single error does
    not ask for certainty.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    classes = len(logits)

    def cross_entropy(log_temperature: float) -> float:
        total = 0.0
        for number, found in enumerate(logits):
            shares = _log_softmax(found / np.exp(log_temperature))
            wrong = 1 / (len(found) + classes)
            target = np.full(classes, wrong)
            target[number] = 1 - (classes - 1) * wrong
            total -= float((shares @ target).mean())
        return total

    bounds = tuple(np.log(TEMPERATURES))
    return float(np.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x)) if classes > 1 else 1.0


def _probabilities(vectors: Matrix, logits: Matrix) -> Matrix:
    unclassified = ~vectors.any(axis=1, keepdims=True)
    return np.hstack([np.where(unclassified, 0.0, np.exp(_log_softmax(logits))), unclassified])


def _log_softmax(logits: Matrix) -> Matrix:
    shifted: Matrix = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _wheel_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the linear probe needs {package}, which is not installed: pip install 'vtmix[train]'")
    return Path(spec.origin).parent
