"""Fitting: from labelled examples to an artifact.

In: a model, labelled examples, hook points and poolings to choose from. Out: an `Artifact` that is fitted for one pooling and
calibrated on scores out of fold, and the curve of the sweep.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..activations.batch import tokenize_examples
from ..activations.canaries import make_canaries
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import decoder_layers, hidden_size
from ..activations.identity import identity, structure
from ..activations.read import read, read_activations, read_pooled, token_weights
from ..activations.tap import adapters_on
from ..messages import as_list
from .artifact import Artifact, Header, library_versions
from .attention import Tokens, fit_attention
from .linear import (
    STRENGTHS,
    LinearProbe,
    cross_validate,
    fold_aurocs,
    folds,
    log_loss,
    platt,
    separates,
)
from .pooling import ATTENTION, FITTED, POOLINGS, pool
from .readout import Readout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..activations.batch import TokenBatch
    from ..sae.autoencoder import SparseAutoencoder
    from .attention import Query
    from .examples import Examples
    from .latents import Latents
    from .linear import (
        CrossValidated,
    )

logger = logging.getLogger(__name__)

KINDS = ("direction", "probe", "sae_latents")
# Activations of single tokens that a sweep with `attention` holds at once; more hook points are read in several passes.
SWEEP_BYTES = 2 << 30


@dataclass(frozen=True)
class SweepPoint:
    """Cross-validated AUROC of one hook point under one pooling, folds split by prompt: mean and standard deviation over folds.

    `log_loss` is that of the scores out of fold, in nats, after calibration on them; both labels weigh alike.
    """

    hook_point: str
    auroc: float
    std: float
    pooling: str = "mean"
    log_loss: float = float("nan")


@dataclass(frozen=True)
class Fit:
    """A fitted artifact and how its hook point and pooling were chosen (an empty curve where both were given)."""

    artifact: Artifact
    curve: list[SweepPoint]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A hook point and a pooling, with what its folds say of the features under it, and of `attention` the query."""

    hook_point: str
    pooling: str
    chosen: CrossValidated
    features: np.ndarray = field(repr=False)  # (N, D)
    query: Query | None = None


_Features = tuple[str, dict[str, np.ndarray], Tokens | None]


def fit_probe(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    hook_points: str | Sequence[str],
    *,
    model_id: str,
    kind: str = "probe",
    pooling: str | Sequence[str] = "mean",
    sae: SparseAutoencoder | None = None,
    latents: Sequence[int] | None = None,
    method: str = "logistic_regression",
    regularization: float | None = None,
    seed: int = 0,
    include_end_of_turn: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = False,
) -> Fit:
    """Probe or direction of a concept, at the best of the given hook points and poolings.

    How strongly to regularize, how sharply to attend, and which hook point and pooling to take is all chosen by cross-validation
    within these examples, folds split by prompt; so is the calibration. Evidence is another matter: `check_card`, on other
    examples.

    Args:
        model (`nn.Module`), tokenizer: the model that will be read: the reference.
        examples (`Examples`): labelled examples.
        hook_points (`Sequence[str]`): with more than one, that with the highest cross-validated AUROC is taken.
        model_id (`str`): name that the artifact carries.
        kind (`str`, defaults to `"probe"`): or `direction`: the unit vector of the probe's weight, without a bias; or
            `sae_latents`: the probe's weight is on latents of a sparse autoencoder, at its own hook point.
        pooling (`str` or `Sequence[str]`, defaults to `"mean"`): what it is fitted for: `mean`, `last` or `attention`; of several
            the best is taken. A fit for `mean` or `last` is calibrated for every pooling that has no query.
        sae (`SparseAutoencoder`), latents (`Sequence[int]`): of `sae_latents`: which latents of which.
        method (`str`), regularization (`float`, *optional*): see `LinearProbe`.
        seed (`int`, defaults to 0): of the folds.
        include_end_of_turn (`bool`, defaults to `False`): count end-of-turn tokens that close a completion; then
            the examples must hold them, as `completion_ids`.
        progress (`bool`): show progress bars.

    Raises:
        `ValueError`: too few examples of a class or too few prompts, an example without counted tokens, activations that are not
            finite, latents that are never on.
    """
    require_bare(model)
    hook_points, poolings = as_list(hook_points), _poolings(pooling)
    if kind not in KINDS or (kind == "sae_latents") != (sae is not None and latents is not None):
        raise ValueError(
            f"`kind` is {kind!r}, with{'' if sae is not None else 'out'} `sae`, `latents` {latents} – expected one of "
            f"{', '.join(KINDS)}; `sae_latents` with both, the others with none."
        )
    if sae is not None and ATTENTION in poolings:
        raise ValueError(
            "`pooling` is `attention` for `sae_latents` – expected `mean` or `last`: latents are few, and have no query. "
            "Fit a `probe` for attention."
        )
    LinearProbe(method, regularization)  # an unknown method is refused before anything is read
    if sae is not None:
        sae.check_model(model)
    ends = end_of_turn_ids(model, tokenizer, chat_template)
    batch = tokenize_examples(examples.rows, tokenizer, chat_template, chat_template_kwargs, ends, include_end_of_turn)
    if not batch.completion_mask.any(1).all():
        row = int((~batch.completion_mask.any(1)).nonzero()[0])
        raise ValueError(f"Example {row} has no token that counts – expected a completion. Remove it.")
    labels, groups = examples.labels, examples.groups
    splits = folds(labels, groups, seed)
    label = "reading activations" if progress else None
    chosen: Latents | None = None
    if sae is not None and latents is not None:
        chosen = sae.latents(latents)
        hook_points = [chosen.hook_point]
        sets: Iterator[_Features] = iter([(chosen.hook_point, {}, latent_tokens(model, batch, chosen, label))])
    else:
        sets = _features(model, batch, hook_points, poolings, label)
    strengths = STRENGTHS if regularization is None else (regularization,)
    winner, curve = _best(sets, poolings, labels, splits, method, strengths, len(hook_points) if progress else None)
    strength = winner.chosen.strength if method == "logistic_regression" else None
    weight, bias = LinearProbe(method, strength).fit(winner.features, labels)
    weights, biases = winner.chosen.weights, winner.chosen.biases
    if not weight.any():
        raise ValueError(
            f"All activations at `{winner.hook_point}` are alike in the {len(labels)} examples – expected some that differ. Read "
            "after a decoder layer, and look at whether all answers are the same."
        )
    if kind == "direction":
        weight, bias = weight / np.linalg.norm(weight), 0.0
        weights, biases = weights / np.linalg.norm(weights, axis=1, keepdims=True), np.zeros(len(biases))
    query, query_bias = None, 0.0
    if winner.query is None:
        out_of_fold = _out_of_fold(model, batch, winner.hook_point, weights, biases, splits, chosen)
    else:
        query, query_bias = torch.tensor(winner.query.vector, dtype=torch.float32), -winner.query.sink
        bias = -float(winner.query.center @ weight)
        out_of_fold = {ATTENTION: winner.chosen.scores.copy()}
        for own, full, (_, test) in zip(weights, winner.chosen.weights, splits, strict=True):
            out_of_fold[ATTENTION][test] *= np.linalg.norm(own) / np.linalg.norm(full)  # 1, but for a direction
    vector = torch.tensor(weight, dtype=torch.float32)
    readout = Readout(
        "fit", winner.hook_point, vector, bias, winner.pooling, latents=chosen, query=query, query_bias=query_bias
    )
    header = Header(
        kind=kind,
        method=method,
        hook_point=winner.hook_point,
        width=len(weight) if chosen is None else chosen.width,
        model_id=model_id,
        identity=identity(model, winner.hook_point),
        structure=structure(model),
        label_names=examples.label_names,
        data=examples.fingerprint,
        examples=len(examples),
        seed=seed,
        calibration=_calibrate(labels, groups, out_of_fold, len(curve)),
        include_end_of_turn=include_end_of_turn,
        versions=library_versions(),
        canaries=make_canaries(model, tokenizer, winner.hook_point, readout.read_directions).entry(),
        sae={} if sae is None else _description(sae, latents or ()),
        pooling=winner.pooling,
        regularization=strength,
        sharpness=None if winner.query is None else winner.query.sharpness,
    )
    return Fit(Artifact(vector, bias, header, chosen, query, query_bias), curve if len(curve) > 1 else [])


def _best(
    sets: Iterator[_Features],
    poolings: Sequence[str],
    labels: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    method: str,
    strengths: Sequence[float],
    progress: int | None,
) -> tuple[_Candidate, list[SweepPoint]]:
    """The hook point and pooling with the highest cross-validated AUROC, of equal ones the lowest log-loss; and all of them."""
    best: tuple[tuple[float, float], _Candidate] | None = None
    curve: list[SweepPoint] = []
    total = None if progress is None else progress * len(poolings)
    with tqdm(total=total, desc="fitting", unit="fit", disable=progress is None, leave=False) as bar:
        for point, pooled, tokens in sets:
            for how in poolings:
                candidate = _candidate(point, how, pooled, tokens, labels, splits, method, strengths)
                found = _sweep_point(candidate, labels, splits)
                curve.append(found)
                bar.update()
                rank = (found.auroc, -found.log_loss)
                if best is None or rank > best[0]:
                    best = rank, candidate
    assert best is not None
    return best[1], curve


def _poolings(pooling: str | Sequence[str]) -> list[str]:
    poolings = list(dict.fromkeys(as_list(pooling)))
    if unknown := [how for how in poolings if how not in FITTED]:
        known = ", ".join(f"`{how}`" for how in FITTED)
        hint = " A fit for `mean` is calibrated for it too." if unknown[0] in POOLINGS else ""
        raise ValueError(f"`pooling` of the fit is `{unknown[0]}` – expected {known}, or several of them.{hint}")
    if not poolings:
        raise ValueError("`pooling` is empty – expected what to fit for, such as `mean`.")
    return poolings


def _features(
    model: Any, batch: TokenBatch, hook_points: Sequence[str], poolings: Sequence[str], label: str | None
) -> Iterator[_Features]:
    """Hook point, pooled activations (N, D) per pooling that has no query, and single tokens where there is one that has."""
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
            yield point, {how: pooled[how, point].double().numpy() for how in plain}, tokens


def _candidate(
    point: str, how: str, pooled: dict[str, np.ndarray], tokens: Tokens | None, labels: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]], method: str, strengths: Sequence[float],
) -> _Candidate:  # fmt: skip
    if how == ATTENTION:
        assert tokens is not None
        attended = fit_attention(tokens, labels, splits, method, strengths)
        return _Candidate(point, how, attended.chosen, attended.features, attended.query)
    features = pooled[how] if how in pooled else tokens.pooled(how)  # type: ignore[union-attr]
    return _Candidate(point, how, cross_validate(features, labels, splits, method, strengths), features)


def _sweep_point(
    candidate: _Candidate, labels: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]]
) -> SweepPoint:
    scores = candidate.chosen.scores
    scale, offset = platt(labels, scores)
    auroc, std = fold_aurocs(labels, scores, splits)
    return SweepPoint(candidate.hook_point, auroc, std, candidate.pooling, log_loss(labels, scale * scores + offset))


def require_bare(model: Any) -> None:
    """Raises `ValueError` for a model with an active adapter: what is fitted or checked on it is not what a reward reads."""
    if adapters_on(model):
        raise ValueError(
            "The model has an active adapter – expected the bare reference model: an artifact names the base model's weights, "
            "and a reward reads it without adapters. Merge the adapter and save the model, or switch it off."
        )


def latent_tokens(model: Any, batch: TokenBatch, latents: Latents, progress: str | None = None) -> Tokens:
    """Latents of the counted tokens, K each.

    Raises:
        `ValueError`: none is ever on.
    """
    scores = read(model, batch, [latents], progress=progress)[latents.name]
    values = scores.scores[scores.mask].numpy()
    if not values.any():
        raise ValueError(
            f"None of the {values.shape[1]} latents is on anywhere in the {len(batch)} examples – expected some that tell the "
            "labels apart. Find them with `interp-rlhf sae find`."
        )
    return Tokens.of(values, scores.mask.sum(1).numpy())


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


class _Folds:
    """The probes of all folds but one, as one readout: scores (B, T, F)."""

    name = "folds"

    def __init__(self, hook_point: str, weights: np.ndarray, biases: np.ndarray, latents: Latents | None):
        self.hook_point, self.latents = hook_point, latents
        self.weights, self.biases = torch.tensor(weights.T).float(), torch.tensor(biases).float()

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        read = activation if self.latents is None else self.latents(activation)
        return read @ self.weights.to(read) + self.biases.to(read)


def _out_of_fold(
    model: Any,
    batch: TokenBatch,
    hook_point: str,
    weights: np.ndarray,
    biases: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    latents: Latents | None,
) -> dict[str, np.ndarray]:
    """Pooling to pooled scores (N,), each by the probe that did not see the row's prompt."""
    scores = read(model, batch, [_Folds(hook_point, weights, biases, latents)])["folds"]
    found = {}
    for pooling in POOLINGS:
        if pooling == ATTENTION:
            continue
        pooled = pool(scores.scores, scores.mask, pooling).double().numpy()
        values = np.zeros(len(batch))
        for fold, (_, test) in enumerate(splits):
            values[test] = pooled[test, fold]
        found[pooling] = values
    return found


def _calibrate(
    labels: np.ndarray, groups: Sequence[str], out_of_fold: dict[str, np.ndarray], candidates: int
) -> dict[str, tuple[float, float]]:
    """Scale and offset per pooling that make the pooled score a log-odds; a pooling that does not separate the labels out of fold
    is left out."""
    found: dict[str, tuple[float, float]] = {}
    for pooling, scores in out_of_fold.items():
        scale, offset = platt(labels, scores)
        if scale > 0 and separates(labels, scores, groups, candidates):
            found[pooling] = (scale, offset)
        else:
            logger.warning(
                "Pooling `%s` does not separate the labels out of fold; the artifact leaves it out.", pooling
            )
    return found
