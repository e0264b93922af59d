"""Fitting: from labelled examples to an artifact.

In: a model, labelled examples, hook points and poolings to choose from. Out: an `Artifact`, fitted for one pooling and calibrated
on scores out of fold, and the curve of the sweep. It must not know cards.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.batch import tokenize_examples
from ..activations.canaries import make_canaries
from ..activations.collect import read_activations, read_pooled, token_weights
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import adapters_on, decoder_layers, hidden_size
from ..activations.identity import identity, structure
from ..activations.read import read
from ..messages import as_list
from .artifact import Artifact, Header, library_versions, read_directions
from .attention import Tokens
from .linear import STRENGTHS, LinearProbe, folds, platt, separates
from .pooling import ATTENTION, POOLINGS, pool
from .sweep import Features, best_candidate, fitted_poolings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..activations.batch import TokenBatch
    from .examples import Examples
    from .latents import Latents, LatentSource
    from .sweep import Candidate, Splits, SweepPoint

logger = logging.getLogger(__name__)

PROBE_KINDS = ("direction", "probe", "sae_latents")
# Activations of single tokens that a sweep with `attention` holds at once. More hook points are read in several passes.
SWEEP_BYTES = 2 << 30


@dataclass(frozen=True)
class Fit:
    """A fitted artifact, and how its hook point and pooling were chosen.

    Attributes:
        artifact (`Artifact`): the weights and their description.
        curve (`list[SweepPoint]`): one point per candidate. Empty if there was only one.
    """

    artifact: Artifact
    curve: list[SweepPoint]


@dataclass(frozen=True, eq=False)
class _Task:
    """What a fit is made of: the tokenized examples, their folds, and the user's choices.

    Attributes:
        latents (`Latents`, *optional*): for `sae_latents`: the latents that are read.
        sae (`dict`): their description, for the header.
    """

    model: Any
    tokenizer: Any
    examples: Examples
    batch: TokenBatch
    splits: Splits
    kind: str
    method: str
    latents: Latents | None
    sae: dict[str, Any]
    progress: bool


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A probe on all examples, and the scores (N,) of its folds by pooling, each by a probe that did not see the row's prompt."""

    vector: torch.Tensor
    bias: float
    query: torch.Tensor | None
    query_bias: float
    out_of_fold: dict[str, np.ndarray]


def fit_probe(
    model: Any, tokenizer: Any, examples: Examples, hook_points: str | Sequence[str], *, model_id: str, kind: str = "probe",
    pooling: str | Sequence[str] = "mean", sae: LatentSource | None = None, latents: Sequence[int] | None = None,
    method: str = "logistic_regression", regularization: float | None = None, seed: int = 0,
    include_end_of_turn: bool = False, chat_template: str | None = None, chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> Fit:  # fmt: skip
    """Fit a probe or a direction of a concept, at the best of the given hook points and poolings.

    Cross-validation within these examples, with folds split by prompt, chooses the regularization, the sharpness of attention,
    the hook point and the pooling. It also calibrates the score. Evidence is another matter: see `check_card`.

    Args:
        model (`nn.Module`), tokenizer: the reference model, which will be read.
        examples (`Examples`): labelled examples.
        hook_points (`str` or `Sequence[str]`): module paths. The one with the highest cross-validated AUROC is taken.
        model_id (`str`): name of the model, for the artifact.
        kind (`str`, defaults to `"probe"`): `direction`: the unit vector of the probe's weight, without a bias. `sae_latents`: a
            probe on latents of a sparse autoencoder, at its hook point.
        pooling (`str` or `Sequence[str]`, defaults to `"mean"`): poolings to fit for: `mean`, `last` or `attention`. The best is
            taken. A fit for `mean` or `last` is calibrated for every registered pooling that has no query.
        sae (`SparseAutoencoder`), latents (`Sequence[int]`): for `sae_latents`: the autoencoder, and the indices of the latents.
        method (`str`), regularization (`float`, *optional*): see `LinearProbe`.
        seed (`int`, defaults to 0): seed of the folds.
        include_end_of_turn (`bool`, defaults to `False`): count end-of-turn tokens at the end of a completion. Then the examples
            must hold them, as `completion_ids`.
        chat_template (`str`), chat_template_kwargs (`dict`, *optional*): how messages become text.
        progress (`bool`): show progress bars.

    Returns:
        `Fit`: the artifact, and a point of the curve for each hook point and pooling.

    Raises:
        `ValueError`: too few examples or prompts, an example without counted tokens, activations that are not finite or all
            alike, latents that are never on.

    Example:
        >>> from interp_rlhf import fit_probe
        >>> fit = fit_probe(model, tokenizer, examples, ["model.layers.0", "model.layers.1"], model_id="tiny")
        >>> fit.artifact.header.pooling, [point.hook_point for point in fit.curve]
        ('mean', ['model.layers.0', 'model.layers.1'])
    """
    require_bare(model)
    poolings = fitted_poolings(pooling)
    _require_kind(kind, poolings, sae, latents)
    LinearProbe(method, regularization)  # an unknown method is refused before anything is read
    chosen, description = _chosen_latents(model, sae, latents)
    ends = end_of_turn_ids(model, tokenizer, chat_template)
    batch = tokenize_examples(examples.rows, tokenizer, chat_template, chat_template_kwargs, ends, include_end_of_turn)
    splits = _splits(examples, batch, seed)
    task = _Task(model, tokenizer, examples, batch, splits, kind, method, chosen, description, progress)
    strengths = STRENGTHS if regularization is None else (regularization,)
    return _fit(task, as_list(hook_points), poolings, strengths, model_id, seed, include_end_of_turn)


def _require_kind(kind: str, poolings: Sequence[str], sae: LatentSource | None, latents: Sequence[int] | None) -> None:
    if kind not in PROBE_KINDS or (kind == "sae_latents") != (sae is not None and latents is not None):
        raise ValueError(
            f"`kind` is {kind!r}, with{'' if sae is not None else 'out'} `sae`, `latents` {latents} – expected one of "
            f"{', '.join(PROBE_KINDS)}. Pass `sae` and `latents` for `sae_latents`, and neither for the others."
        )
    if sae is not None and ATTENTION in poolings:
        raise ValueError(
            "`pooling` is `attention` for `sae_latents` – expected `mean` or `last`: latents are few, and have no query. "
            "Fit a `probe` for attention."
        )


def _chosen_latents(
    model: Any, sae: LatentSource | None, indices: Sequence[int] | None
) -> tuple[Latents | None, dict[str, Any]]:
    """Latents of an autoencoder of this model, and what the header says of them."""
    if sae is None or indices is None:
        return None, {}
    sae.check_model(model)
    return sae.latents(indices), {"latents": list(indices), **sae.description()}


def _splits(examples: Examples, batch: TokenBatch, seed: int) -> Splits:
    if not batch.completion_mask.any(1).all():
        row = int((~batch.completion_mask.any(1)).nonzero()[0])
        raise ValueError(f"Example {row} has no token that counts – expected a completion. Remove it.")
    return folds(examples.labels, examples.groups, seed)


def _fit(
    task: _Task, hook_points: Sequence[str], poolings: Sequence[str], strengths: Sequence[float], model_id: str, seed: int,
    include_end_of_turn: bool,
) -> Fit:  # fmt: skip
    """The best candidate, fitted on all examples."""
    examples, label = task.examples, "reading activations" if task.progress else None
    if task.latents is None:
        sets = _features(task.model, task.batch, hook_points, poolings, label)
    else:
        hook_points = [task.latents.hook_point]
        tokens = latent_tokens(task.model, task.batch, task.latents, label)
        sets = iter([Features(task.latents.hook_point, {}, tokens)])
    winner, curve = best_candidate(
        sets, poolings, examples.labels, task.splits, task.method, strengths,
        len(hook_points) if task.progress else None,
    )  # fmt: skip
    strength = winner.chosen.strength if task.method == "logistic_regression" else None
    fitted = _fitted(task, winner, strength)
    directions = read_directions(fitted.vector, task.latents, fitted.query)
    header = Header(
        kind=task.kind,
        method=task.method,
        hook_point=winner.hook_point,
        width=len(fitted.vector) if task.latents is None else task.latents.width,
        model_id=model_id,
        identity=identity(task.model, winner.hook_point),
        structure=structure(task.model),
        label_names=examples.label_names,
        data=examples.fingerprint,
        examples=len(examples),
        seed=seed,
        calibration=_calibrations(examples.labels, examples.groups, fitted.out_of_fold, len(curve)),
        include_end_of_turn=include_end_of_turn,
        versions=library_versions(),
        canaries=make_canaries(task.model, task.tokenizer, winner.hook_point, directions).entry(),
        sae=task.sae,
        pooling=winner.pooling,
        regularization=strength,
        sharpness=None if winner.query is None else winner.query.sharpness,
    )
    artifact = Artifact(fitted.vector, fitted.bias, header, task.latents, fitted.query, fitted.query_bias)
    return Fit(artifact, curve if len(curve) > 1 else [])


def _features(
    model: Any, batch: TokenBatch, hook_points: Sequence[str], poolings: Sequence[str], label: str | None
) -> Iterator[Features]:
    """Pooled activations for the poolings without a query, and single tokens for `attention`."""
    plain = [how for how in poolings if how != ATTENTION]
    wanted = {(how, point): (point, token_weights(batch, how)) for how in plain for point in hook_points}
    pooled = read_pooled(model, batch, wanted, progress=label) if plain else {}
    lengths = batch.completion_mask.sum(1).numpy()
    each = max(1, 4 * int(lengths.sum()) * hidden_size(model))
    size = max(1, SWEEP_BYTES // each) if ATTENTION in poolings else len(hook_points)
    for start in range(0, len(hook_points), size):
        group = list(hook_points[start : start + size])
        single = read_activations(model, batch, group) if ATTENTION in poolings else {}
        for point in group:
            tokens = Tokens.of(single.pop(point).numpy(), lengths) if single else None
            yield Features(point, {how: pooled[how, point].double().numpy() for how in plain}, tokens)


def _fitted(task: _Task, winner: Candidate, strength: float | None) -> _Fitted:
    """Weight and bias on all examples, and scores out of fold for the calibration."""
    weight, bias = LinearProbe(task.method, strength).fit(winner.features, task.examples.labels)
    weights, biases = winner.chosen.weights, winner.chosen.biases
    if not weight.any():
        raise ValueError(
            f"All activations at `{winner.hook_point}` are alike in the {len(task.examples)} examples – expected some that "
            "differ. Read after a decoder layer, and look at whether all answers are the same."
        )
    if task.kind == "direction":
        weight, bias = weight / np.linalg.norm(weight), 0.0
        weights, biases = weights / np.linalg.norm(weights, axis=1, keepdims=True), np.zeros(len(biases))
    query, query_bias = None, 0.0
    if winner.query is None:
        out_of_fold = _scores_out_of_fold(task, winner.hook_point, weights, biases)
    else:
        query, query_bias = torch.tensor(winner.query.vector, dtype=torch.float32), -winner.query.sink
        bias = -float(winner.query.center @ weight)
        scores = winner.chosen.scores.copy()
        for scaled, full, (_, test) in zip(weights, winner.chosen.weights, task.splits, strict=True):
            scores[test] *= np.linalg.norm(scaled) / np.linalg.norm(full)  # 1, except for a direction
        out_of_fold = {ATTENTION: scores}
    return _Fitted(torch.tensor(weight, dtype=torch.float32), bias, query, query_bias, out_of_fold)


def require_bare(model: Any) -> None:
    """Refuse a model with an active adapter: a reward reads the model without it.

    Raises:
        `ValueError`: an adapter is active.
    """
    if adapters_on(model):
        raise ValueError(
            "The model has an active adapter – expected the bare reference model: an artifact names the base model's weights, "
            "and a reward reads it without adapters. Merge the adapter and save the model, or switch it off."
        )


def latent_tokens(model: Any, batch: TokenBatch, latents: Latents, progress: str | None = None) -> Tokens:
    """Latents of the counted tokens, K each.

    Raises:
        `ValueError`: none of them is ever on.
    """
    scores = read(model, batch, [latents], progress=progress)[latents.name]
    values = scores.scores[scores.mask].numpy()
    if not values.any():
        raise ValueError(
            f"None of the {values.shape[1]} latents is on anywhere in the {len(batch)} examples – expected some that tell the "
            "labels apart. Find them with `interp-rlhf sae find`."
        )
    return Tokens.of(values, scores.mask.sum(1).numpy())


def sweep_points(model: Any, every: int = 1) -> list[str]:
    """Hook points of a layer sweep: every n-th decoder layer, counted back from the last but one.

    The last layer is left out: its output serves the prediction.
    """
    layers = decoder_layers(model)[:-1]
    return layers[::-1][::every][::-1]


class _Folds:
    """The probes of the folds as one readout: scores (B, T, F)."""

    name = "folds"

    def __init__(self, hook_point: str, weights: np.ndarray, biases: np.ndarray, latents: Latents | None):
        self.hook_point, self.latents = hook_point, latents
        self.weights, self.biases = torch.tensor(weights.T).float(), torch.tensor(biases).float()

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        values = activation if self.latents is None else self.latents(activation)
        return values @ self.weights.to(values) + self.biases.to(values)


def _scores_out_of_fold(
    task: _Task, hook_point: str, weights: np.ndarray, biases: np.ndarray
) -> dict[str, np.ndarray]:
    """Pooling to pooled scores (N,), each by the probe that did not see the row's prompt."""
    scores = read(task.model, task.batch, [_Folds(hook_point, weights, biases, task.latents)])["folds"]
    by_pooling = {}
    for pooling in POOLINGS:
        if pooling == ATTENTION:
            continue
        pooled = pool(scores.scores, scores.mask, pooling).double().numpy()
        values = np.zeros(len(task.batch))
        for fold, (_, test) in enumerate(task.splits):
            values[test] = pooled[test, fold]
        by_pooling[pooling] = values
    return by_pooling


def _calibrations(
    labels: np.ndarray, groups: Sequence[str], out_of_fold: dict[str, np.ndarray], candidates: int
) -> dict[str, tuple[float, float]]:
    """Scale and offset per pooling, which make the pooled score a log-odds. Poolings whose scores out of fold do not separate
    the labels are left out."""
    calibrations: dict[str, tuple[float, float]] = {}
    for pooling, scores in out_of_fold.items():
        scale, offset = platt(labels, scores)
        if scale > 0 and separates(labels, scores, groups, candidates):
            calibrations[pooling] = (scale, offset)
        else:
            logger.warning(
                "Pooling `%s` does not separate the labels out of fold; the artifact leaves it out.", pooling
            )
    return calibrations
