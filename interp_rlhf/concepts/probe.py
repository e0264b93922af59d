"""Fitting: from labelled examples to an artifact.

In: a model, labelled examples, a hook point or several to choose from. Out: an `Artifact` with a calibration per
pooling, and the curve of the layer sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..activations import (
    TokenBatch,
    adapters_on,
    decoder_layers,
    end_of_turn_ids,
    identity,
    make_canaries,
    read,
    read_means,
    structure,
    tokenize_examples,
)
from ..messages import as_list
from .artifact import Artifact, Header, library_versions
from .examples import Examples
from .latents import Latents
from .pooling import POOLINGS, pool
from .readout import Readout
from .sae.autoencoder import SparseAutoencoder

logger = logging.getLogger(__name__)

METHODS = ("logistic_regression", "difference_of_means")
# Inverse strength of the L2 penalty on standardized activations. There are far more dimensions than examples: at
# scikit-learn's default of 1 the training set is separated and the weight follows its noise.
REGULARIZATION = 0.001
# The same for a handful of latents, of which there are fewer than examples.
LATENT_REGULARIZATION = 1.0
KINDS = ("direction", "probe", "sae_latents")
FOLDS = 5


@dataclass(frozen=True)
class SweepPoint:
    """Cross-validated AUROC of one hook point, folds split by prompt: mean and standard deviation over folds."""

    hook_point: str
    auroc: float
    std: float


@dataclass(frozen=True)
class Fit:
    """A fitted artifact and how its hook point was chosen (an empty curve where it was given)."""

    artifact: Artifact
    curve: list[SweepPoint]


class LinearProbe:
    """A linear classifier on mean-pooled activations, folded back into one weight and one bias.

    Since the mean over tokens commutes with a linear map, the mean of its per-token scores is exactly what was fitted.

    Args:
        method (`str`, defaults to `"logistic_regression"`): or `difference_of_means`: the direction from the mean of
            one class to that of the other, on standardized activations, with the threshold half-way (Marks & Tegmark,
            arXiv 2310.06824). Deviation: they do not standardize; without it, the few dimensions with massive
            activations decide alone.
        regularization (`float`): inverse strength of the L2 penalty (scikit-learn's `C`).
        seed (`int`, defaults to 0): of the folds.
    """

    def __init__(self, method: str = "logistic_regression", regularization: float = REGULARIZATION, seed: int = 0):
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r} – expected one of {', '.join(METHODS)}.")
        self.method, self.regularization, self.seed = method, regularization, seed

    def fit(self, means: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
        """Weight (D,) and bias on raw activations.

        Args:
            means (`np.ndarray` of shape (N, D)): mean-pooled activations.
            labels (`np.ndarray` of shape (N,)): 0 or 1.

        Raises:
            `ValueError`: activations that are not finite.
        """
        if not np.isfinite(means).all():
            bad = int((~np.isfinite(means).all(axis=1)).sum())
            raise ValueError(
                f"{bad} of {len(means)} activations are NaN or infinite – expected finite numbers. Load the model in "
                "float32 or bfloat16 and check its weights."
            )
        center, spread = means.mean(0), means.std(0)
        spread = np.where(
            spread > 1e-6 * spread.max(initial=1e-12), spread, np.inf
        )  # constant dimensions get no weight
        standardized = (means - center) / spread
        if self.method == "difference_of_means":
            weight = standardized[labels == 1].mean(0) - standardized[labels == 0].mean(0)
            middle = (standardized[labels == 1].mean(0) + standardized[labels == 0].mean(0)) / 2
            bias = -float(weight @ middle)
        else:
            from sklearn.linear_model import LogisticRegression

            model = LogisticRegression(C=self.regularization, max_iter=1000, class_weight="balanced")
            model.fit(standardized, labels)
            weight, bias = model.coef_[0], float(model.intercept_[0])
        weight = weight / spread
        return weight, bias - float(weight @ center)


def fit_probe(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    hook_points: str | Sequence[str],
    *,
    model_id: str,
    kind: str = "probe",
    sae: SparseAutoencoder | None = None,
    latents: Sequence[int] | None = None,
    method: str = "logistic_regression",
    seed: int = 0,
    include_end_of_turn: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> Fit:
    """Probe or direction of a concept, at the best of the given hook points.

    Args:
        model (`nn.Module`), tokenizer: the model that will be read: the reference.
        examples (`Examples`): labelled examples.
        hook_points (`Sequence[str]`): with more than one, that with the highest cross-validated AUROC is taken.
        model_id (`str`): name that the artifact carries.
        kind (`str`, defaults to `"probe"`): or `direction`: the unit vector of the probe's weight, without a bias; or
            `sae_latents`: the probe's weight is on latents of a sparse autoencoder, at its own hook point.
        sae (`SparseAutoencoder`), latents (`Sequence[int]`): of `sae_latents`: which latents of which.
        include_end_of_turn (`bool`, defaults to `False`): count end-of-turn tokens that close a completion; then
            the examples must hold them, as `completion_ids`.
        progress (`bool`): show progress bars.

    Raises:
        `ValueError`: too few examples of a class, an example without counted tokens, activations that are not finite, latents
            that are never on.
    """
    require_bare(model)
    hook_points = as_list(hook_points)
    if kind not in KINDS or (kind == "sae_latents") != (sae is not None and latents is not None):
        raise ValueError(
            f"`kind` is {kind!r}, with{'' if sae is not None else 'out'} `sae`, `latents` {latents} – expected one of "
            f"{', '.join(KINDS)}; `sae_latents` with both, the others with none."
        )
    if sae is not None:
        sae.check_model(model)
    counts = np.bincount(examples.labels, minlength=2)
    if counts.min() < FOLDS:
        raise ValueError(
            f"{counts.min()} examples of label `{examples.label_names[int(counts.argmin())]}` – expected at least "
            f"{FOLDS} of each, and some dozens for a probe worth having."
        )
    ends = end_of_turn_ids(model, tokenizer, chat_template)
    batch = tokenize_examples(examples.rows, tokenizer, chat_template, chat_template_kwargs, ends, include_end_of_turn)
    if not batch.completion_mask.any(1).all():
        row = int((~batch.completion_mask.any(1)).nonzero()[0])
        raise ValueError(f"Example {row} has no token that counts – expected a completion. Remove it.")
    label = "reading activations" if progress else None
    chosen: Latents | None = None
    curve: list[SweepPoint] = []
    if sae is not None and latents is not None:
        chosen = sae.latents(latents)
        best = chosen.hook_point
        probe = LinearProbe(method, LATENT_REGULARIZATION, seed)
        weight, bias = probe.fit(mean_latents(model, batch, chosen, label), examples.labels)
    else:
        means = read_means(model, batch, hook_points, progress=label)
        arrays = {point: values.double().numpy() for point, values in means.items()}
        probe = LinearProbe(method, seed=seed)
        curve = _sweep(probe, arrays, examples) if len(arrays) > 1 else []
        best = max(curve, key=lambda point: point.auroc).hook_point if curve else hook_points[0]
        weight, bias = probe.fit(arrays[best], examples.labels)
    if kind == "direction":
        weight, bias = weight / np.linalg.norm(weight), 0.0
    vector = torch.tensor(weight, dtype=torch.float32)
    readout = Readout("fit", best, vector, bias, latents=chosen)
    header = Header(
        kind=kind,
        method=method,
        hook_point=best,
        width=len(weight) if chosen is None else chosen.width,
        model_id=model_id,
        identity=identity(model, best),
        structure=structure(model),
        label_names=examples.label_names,
        data=examples.fingerprint,
        examples=len(examples),
        seed=seed,
        calibration=_calibrate(model, batch, examples.labels, readout),
        include_end_of_turn=include_end_of_turn,
        versions=library_versions(),
        canaries=make_canaries(model, tokenizer, best, readout.read_directions).entry(),
        sae={} if sae is None else _description(sae, latents or ()),
    )
    return Fit(Artifact(vector, bias, header, chosen), curve)


def require_bare(model: Any) -> None:
    """Raises `ValueError` for a model with an active adapter: what is fitted or checked on it is not what a reward reads."""
    if adapters_on(model):
        raise ValueError(
            "The model has an active adapter – expected the bare reference model: an artifact names the base model's weights, "
            "and a reward reads it without adapters. Merge the adapter and save the model, or switch it off."
        )


def mean_latents(model: Any, batch: TokenBatch, latents: Latents, progress: str | None = None) -> np.ndarray:
    """Latents (N, K) averaged over each row's counted tokens.

    Raises:
        `ValueError`: none is ever on.
    """
    scores = read(model, batch, [latents], progress=progress)[latents.name]
    means = pool(scores.scores, scores.mask, "mean").double().numpy()
    if not means.any():
        raise ValueError(
            f"None of the {means.shape[1]} latents is on anywhere in the {len(means)} examples – expected some that tell the "
            "labels apart. Find them with `interp-rlhf sae find`."
        )
    return means


def _description(sae: SparseAutoencoder, indices: Sequence[int]) -> dict[str, Any]:
    spec = sae.spec
    return {
        "latents": list(indices), "size": sae.size, "architecture": spec.architecture, "k": spec.k,
        "grouped": spec.architecture == "groupmax", "normalization": spec.normalization, "source": spec.source,
    }  # fmt: skip


def sweep_points(model: Any, every: int = 1) -> list[str]:
    """Hook points of a layer sweep: every n-th decoder layer, counted back from the last but one.

    The last layer is left out: what it holds is written for the output.
    """
    layers = decoder_layers(model)[:-1]
    return layers[::-1][::every][::-1]


def folds(examples: Examples, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows of each fold; rows of one prompt stay together."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(examples)), examples.labels, examples.groups))


def _sweep(probe: LinearProbe, arrays: dict[str, np.ndarray], examples: Examples) -> list[SweepPoint]:
    from sklearn.metrics import roc_auc_score

    curve = []
    splits = folds(examples, probe.seed)
    for point, means in arrays.items():
        scores = []
        for train, test in splits:
            if len(set(examples.labels[test])) == 2 and len(set(examples.labels[train])) == 2:
                weight, _ = probe.fit(means[train], examples.labels[train])
                scores.append(roc_auc_score(examples.labels[test], means[test] @ weight))
        if not scores:
            raise ValueError(
                f"{len(set(examples.groups))} prompts for {len(examples)} examples – expected at least {FOLDS} prompts "
                "with both labels among them, to choose a layer by cross-validation. Name one `hook_point` instead."
            )
        curve.append(SweepPoint(point, float(np.mean(scores)), float(np.std(scores))))
    return curve


def _calibrate(model: Any, batch: TokenBatch, labels: np.ndarray, readout: Readout) -> dict[str, tuple[float, float]]:
    """Scale and bias per pooling that make the pooled score a log-odds: Platt's logistic regression of one variable.

    A pooling under which the concept's score does not rise with the label is left out. For the probe's own mean pooling
    scale 1 and bias 0 are what the fit already is.
    """
    from sklearn.linear_model import LogisticRegression

    scores = read(model, batch, [readout])["fit"]
    found: dict[str, tuple[float, float]] = {}
    for pooling in POOLINGS:
        pooled = pool(scores.scores, scores.mask, pooling)[:, 0].double().numpy()
        if pooling == "mean" and readout.bias != 0.0:
            found[pooling] = (1.0, 0.0)
            continue
        spread = pooled.std() or 1.0
        platt = LogisticRegression(C=1.0, class_weight="balanced").fit(pooled[:, None] / spread, labels)
        scale = float(platt.coef_[0, 0] / spread)
        if scale > 0:
            found[pooling] = (scale, float(platt.intercept_[0]))
        else:
            logger.warning(
                "Pooling `%s` does not separate the labels in the fit; the artifact leaves it out.", pooling
            )
    return found
