"""`probe check`: a card's readout on data that its fit did not see, beside the controls that it must beat.

In: a card, the model, the fit's examples, other examples, optionally the model's own completions. Out: `Evidence`. Every
probe here, real or control, is read at the positions and with the pooling that the reward will use.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.batch import tokenize_examples
from ..activations.collect import read_activations, read_pooled, read_with_likelihood, token_weights
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import embedding_point
from ..concepts.artifact import library_versions, strength_of
from ..concepts.attention import Query, Tokens
from ..concepts.card import Control, Evidence, Findings
from ..concepts.fitting import require_bare
from ..concepts.linear import LinearProbe, fit_paths, spreads
from ..concepts.pooling import pool
from ..concepts.readout import Readout
from . import baselines
from .added import added
from .dictionaries import (
    PERMUTATIONS,
    RandomDictionaries,
    all_mean_latents,
    permuted_choices,
    sae_findings,
)
from .findings import (
    added_finding,
    calibration_finding,
    estimate,
    prompt_finding,
)
from .overlap import require_apart
from .prompts import read_swapped
from .statistics import auroc_interval, auroc_within, weighted_aurocs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..activations.batch import TokenBatch
    from ..concepts.card import Estimate, LoadedCard
    from ..concepts.examples import Examples
    from ..concepts.latents import Latents
    from ..sae.autoencoder import SparseAutoencoder
    from .prompts import Swapped

logger = logging.getLogger(__name__)

RANDOM_DIRECTIONS = 200
CHUNK_ROWS = 256
NAMED = 3


def check_card(
    card: LoadedCard,
    model: Any,
    tokenizer: Any,
    fit_examples: Examples,
    examples: Examples,
    *,
    completions: Examples | None = None,
    measures: Mapping[str, Callable[[str], float]] | None = None,
    sae: SparseAutoencoder | None = None,
    seed: int = 0,
    command: str = "",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Evidence:
    """Evidence for a card: what its probe adds to text baselines and to the model's own likelihood, and what it must beat.

    The model is run over the fit's examples up to the hook point, over the others once as a whole, and over up to 60 answers put
    under each other's prompts.

    Args:
        card (`LoadedCard`): what is claimed.
        model (`nn.Module`), tokenizer: the reference model.
        fit_examples (`Examples`): what the artifact was fitted on; its fingerprint must be the artifact's. The controls and the
            baselines are fitted on it.
        examples (`Examples`): held out: shares no row and no prompt with the fit, in whatever form.
        completions (`Examples`, *optional*): the model's own answers, labelled by an independent measure or by hand.
        measures (`dict[str, Callable]`, *optional*): independent measures of a text, reported beside the probe.
        sae (`SparseAutoencoder`, *optional*): of a card of latents: the whole autoencoder that they were taken from.
        seed (`int`, defaults to 0): of permutations, directions, dictionaries, folds and bootstrap.
        command (`str`): what the evidence says produced it.
        progress (`bool`): show progress bars.

    Raises:
        `ValueError`: other fit data than the artifact's, held-out rows that the fit has seen, a measure that gives no number, or
            another autoencoder.
    """
    readout = Readout.from_card(card)
    require_bare(model)
    readout.check_model(model)
    header = readout.header
    assert header is not None
    if header.data != fit_examples.fingerprint:
        raise ValueError(
            f"The fit data have fingerprint {fit_examples.fingerprint} – the artifact was fitted on {header.data}. Pass "
            "the very file (and `positive` label) that `probe fit` was given."
        )
    given = {"held-out examples": examples} | ({} if completions is None else {"completions": completions})
    near = {what: require_apart(fit_examples, rows, what) for what, rows in given.items()}
    measured = {what: _measured(measures or {}, rows, what) for what, rows in given.items()}

    def tokens(rows: Examples) -> TokenBatch:
        ends = end_of_turn_ids(model, tokenizer, chat_template)
        batch = tokenize_examples(
            rows.rows, tokenizer, chat_template, chat_template_kwargs, ends, readout.include_end_of_turn
        )
        if not batch.completion_mask.any(1).all():
            row = int((~batch.completion_mask.any(1)).nonzero()[0])
            raise ValueError(f"Row {row} has no token that counts – expected a completion. Remove it.")
        return batch

    _require_its_sae(readout, sae)
    batches = {what: tokens(rows) for what, rows in given.items()}
    label = "reading the fit's examples" if progress else None
    fit_batch = tokens(fit_examples)
    permuted = None
    dictionaries = None
    if readout.latents is not None and sae is not None:
        of_all = all_mean_latents(model, fit_batch, [sae], label)[0]
        permuted = permuted_choices(
            of_all, fit_examples.labels, sae, readout.latents.size, header.method, strength_of(header), seed
        )
        l0 = sae.spec.k or sae_findings(model, fit_batch, sae, progress).l0
        dictionaries = RandomDictionaries(
            model, fit_batch, fit_examples.labels, sae, readout.latents.size, l0, header.method, strength_of(header), seed,
            progress,
        )  # fmt: skip
    fitted = _Fitted.on(model, fit_batch, fit_examples, readout, seed, permuted, label)

    def findings(what: str) -> Findings:
        rows, batch = given[what], batches[what]
        said = f"reading the {what}" if progress else None
        read = fitted.read(model, batch, readout, said)
        swapped = read_swapped(model, rows, read.own, tokens, readout, seed, "swapped prompts" if progress else None)
        found = _findings(rows, fit_examples, read, swapped, measured[what], seed)
        if near[what]:
            shown = ", ".join(f"{row} and {other} of the fit ({same:.2f})" for row, other, same in near[what][:NAMED])
            logger.warning(
                "%d rows of the %s are nearly rows of the fit: %s%s. The evidence counts them; remove them for a cleaner one.",
                len(near[what]), what, shown, " …" if len(near[what]) > NAMED else "",
            )  # fmt: skip
        found = found.model_copy(update={"near_duplicates": len(near[what])})
        if dictionaries is None or sae is None:
            return found
        drawn = dictionaries.scores(model, batch, readout.pooling, progress)
        random = _control(np.array([weighted_aurocs(rows.labels, c, np.ones((1, len(rows))))[0] for c in drawn.T]))
        return found.model_copy(update={"random_dictionary": random, "sae": sae_findings(model, batch, sae, progress)})

    return Evidence(
        readout=card.card.readout_digest,
        held_out=findings("held-out examples"),
        completions=None if completions is None else findings("completions"),
        seed=seed,
        command=command,
        versions=library_versions(),
    )


class Controls:
    """Probes that know nothing, all in one readout: refitted on permuted labels, and random directions.

    Random directions are drawn in the standardized space in which probes are fitted (in the raw one, the few dimensions
    with massive activations would decide alone) and get the better sign on the fit's examples: the same chance to be
    right by luck that the probe had. Under `attention` all of them look where the probe's query does.

    Args:
        features (`np.ndarray` of shape (N, D)): pooled activations of the fit's examples, as the probe was fitted on them.
        permuted (`tuple[Latents, np.ndarray]`, *optional*): of a card of latents: see `permuted_choices`.
        center (`np.ndarray` of shape (D,), *optional*): under `attention`, what the sink stands for.
    """

    name = "controls"

    def __init__(
        self,
        readout: Readout,
        features: np.ndarray,
        labels: np.ndarray,
        seed: int,
        permuted: tuple[Latents, np.ndarray] | None = None,
        center: np.ndarray | None = None,
    ):
        self.hook_point = readout.hook_point
        self.pooling = readout.pooling
        self.logits = None
        if center is not None and readout.query is not None:
            self.logits = readout.query, readout.query_bias, torch.tensor(center, dtype=torch.float32)
        rng = np.random.default_rng(seed)
        self.latents: Latents | None = None
        if permuted is not None:
            self.latents, weights = permuted
        else:
            assert readout.header is not None
            shuffled = [rng.permutation(labels) for _ in range(PERMUTATIONS)]
            strengths = (strength_of(readout.header) or 1.0,)  # a difference of means has none
            weights = np.concatenate(
                [path.weights for path in fit_paths(features, shuffled, readout.header.method, strengths)]
            )
        directions = rng.standard_normal((RANDOM_DIRECTIONS, features.shape[1])) / spreads(features)
        gaps = directions @ (features[labels == 1].mean(0) - features[labels == 0].mean(0))
        directions *= np.where(gaps >= 0, 1.0, -1.0)[:, None]
        self.permuted, self.directions = _columns(weights), _columns(directions)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        logits = []
        if self.logits is not None:
            query, bias, center = self.logits
            logits.append((activation @ query.to(activation) + bias).unsqueeze(-1))
            activation = activation - center.to(activation)
        read = activation if self.latents is None else self.latents(activation)
        return torch.cat([read @ self.permuted.to(read), activation @ self.directions.to(activation), *logits], dim=-1)


def _columns(weights: np.ndarray) -> torch.Tensor:
    """Weights (N, D) as columns at one scale: only the order of scores matters, and this keeps float32 exact enough."""
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    return torch.tensor((weights / np.where(norms > 0, norms, 1)).T, dtype=torch.float32)


def _require_its_sae(readout: Readout, sae: SparseAutoencoder | None) -> None:
    """Raises `ValueError` where a card of latents is checked without the autoencoder that they were taken from."""
    if readout.latents is None:
        if sae is not None:
            raise ValueError(f"`sae` was given and `{readout.name}` is no card of latents – expected none.")
        return
    assert readout.header is not None
    indices = readout.header.sae["latents"]
    if (
        sae is None
        or max(indices) >= sae.size
        or not torch.equal(sae.latents(indices).chosen.cpu(), readout.latents.chosen.cpu())
    ):
        given = "no `sae`" if sae is None else f"an autoencoder of {sae.size} latents that are others"
        raise ValueError(
            f"`{readout.name}` reads latents {indices} of {readout.header.sae['source']} and was given {given} – expected that "
            "autoencoder: its explained variance and a random one of its shape are part of the evidence. Pass it (`--sae`)."
        )


def _measured(measures: Mapping[str, Callable[[str], float]], rows: Examples, what: str) -> dict[str, np.ndarray]:
    """Every measure of every text.

    Raises:
        `ValueError`: one gives no number for a text.
    """
    found = {name: np.array([measure(text) for text in rows.texts], dtype=float) for name, measure in measures.items()}
    for name, values in found.items():
        if (bad := np.flatnonzero(np.isnan(values))).size:
            raise ValueError(
                f"The measure `{name}` gives no number for {bad.size} of {len(rows)} {what}, the first is row {bad[0]} – "
                "expected one for every text: what is left out would rank nowhere. Remove these rows, or let the measure give a "
                "number."
            )
    return found


@dataclass(frozen=True, eq=False)
class _Read:
    """What one pass over examples gives.

    Attributes:
        own (`np.ndarray` of shape (N,)): the card's score.
        log_odds (`np.ndarray` of shape (N,)): the same without the card's transform.
        controls (`np.ndarray` of shape (N, C)): pooled scores of the controls.
        embedding, prompt (`np.ndarray` of shape (N,)): scores of the probe on mean embeddings, and of that at the prompt's last
            token.
        likelihood (`dict[str, np.ndarray]`): `mean` and `sum` of the log-probs of the counted tokens.
    """

    own: np.ndarray
    log_odds: np.ndarray
    controls: np.ndarray
    embedding: np.ndarray
    prompt: np.ndarray
    likelihood: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What has to be fitted on the fit's examples before others are looked at."""

    controls: Controls
    embedding: tuple[str, np.ndarray]
    prompt: np.ndarray

    @classmethod
    def on(
        cls, model: Any, batch: TokenBatch, examples: Examples, readout: Readout, seed: int,
        permuted: tuple[Latents, np.ndarray] | None, progress: str | None,
    ) -> _Fitted:  # fmt: skip
        assert readout.header is not None
        how = "last" if readout.header.pooling == "last" else "mean"
        point, embedding = readout.hook_point, embedding_point(model)
        pooled = {
            name: values.double().numpy() for name, values in read_pooled(
                model, batch,
                {
                    "features": (point, token_weights(batch, how)), "embedding": (embedding, token_weights(batch, "mean")),
                    "prompt": (point, token_weights(batch, "before")),
                },
                progress=progress,
            ).items()
        }  # fmt: skip
        center = None
        if readout.query is not None:
            pooled["features"], center = _attended(model, batch, readout)
        labels, groups = examples.labels, examples.groups

        def weight(name: str) -> np.ndarray:
            return LinearProbe(readout.header.method, seed=seed).fit(pooled[name], labels, groups)[0]  # type: ignore[union-attr]

        return cls(
            Controls(readout, pooled["features"], labels, seed, permuted, center),
            (embedding, weight("embedding")),
            weight("prompt") if any(examples.prompts) else np.zeros(pooled["prompt"].shape[1]),
        )

    def read(self, model: Any, batch: TokenBatch, readout: Readout, progress: str | None) -> _Read:
        """By one whole forward, in chunks of rows: per-token scores of so many controls never pile up."""
        parts: list[list[np.ndarray]] = []
        plain = replace(readout, transform=None)
        for start in range(0, len(batch), CHUNK_ROWS):
            part = batch.part(slice(start, start + CHUNK_ROWS))
            scores, pooled, log_probs = read_with_likelihood(
                model, part, [readout, self.controls],
                {
                    "embedding": (self.embedding[0], token_weights(part, "mean")),
                    "prompt": (readout.hook_point, token_weights(part, "before")),
                },
                reader="reference", progress=progress,
            )  # fmt: skip
            drawn = pool(scores["controls"].scores, part.completion_mask, self.controls.pooling)
            total = log_probs.double().sum(1).numpy()
            parts.append([
                np.array(readout.score(scores[readout.name]), dtype=float),
                np.array(plain.score(scores[readout.name]), dtype=float), drawn.double().numpy(),
                pooled["embedding"].double().numpy() @ self.embedding[1], pooled["prompt"].double().numpy() @ self.prompt,
                total / part.completion_mask.sum(1).numpy(), total,
            ])  # fmt: skip
        own, log_odds, controls, embedding, prompt, mean, total = map(np.concatenate, zip(*parts, strict=True))
        return _Read(own, log_odds, controls, embedding, prompt, {"mean": mean, "sum": total})


def _attended(model: Any, batch: TokenBatch, readout: Readout) -> tuple[np.ndarray, np.ndarray]:
    """Activations (N, D) of the fit's examples as a readout's query attends to them, and the mean (D,) over their tokens."""
    assert readout.query is not None
    values = read_activations(model, batch, [readout.hook_point])[readout.hook_point].numpy()
    center = values.mean(0, dtype=np.float64)
    query = Query(readout.query.double().numpy(), -readout.query_bias, center, float("nan"))
    return Tokens.of(values, batch.completion_mask.sum(1).numpy()).attended(query), center


def _findings(
    rows: Examples,
    fit: Examples,
    read: _Read,
    swapped: Swapped | None,
    measured: Mapping[str, np.ndarray],
    seed: int,
) -> Findings:
    labels, groups = rows.labels, rows.groups

    def interval(scores: np.ndarray) -> Estimate:
        return estimate(auroc_interval(labels, scores, groups, seed))

    once = np.ones((1, len(labels)))
    controls = np.array([weighted_aurocs(labels, column, once)[0] for column in read.controls.T])
    words = _words(fit, rows, seed)
    has_prompts = any(rows.prompts)
    others = {
        **words, "embedding": read.embedding, **({"prompt_probe": read.prompt} if has_prompts else {}),
        **{f"likelihood_{how}": values for how, values in read.likelihood.items()},
    }  # fmt: skip
    within = auroc_within(labels, read.own, groups, seed)
    return Findings(
        data=rows.fingerprint,
        examples=len(rows),
        positives=int(labels.sum()),
        adds=added_finding(added(labels, read.own, others, groups, seed)),
        probe=interval(read.own),
        calibration=calibration_finding(labels, read.log_odds),
        permutation=_control(controls[:PERMUTATIONS]),
        random_direction=_control(controls[PERMUTATIONS:]),
        tfidf=interval(words["tfidf"]),
        length=interval(words["length"]),
        punctuation=interval(words["punctuation"]),
        embedding=interval(read.embedding),
        likelihood={how: interval(values) for how, values in read.likelihood.items()},
        prompt=None if not has_prompts else prompt_finding(
            tfidf=interval(words["tfidf_prompt"]), both=interval(words["tfidf_both"]), probe=interval(read.prompt),
            within=within, swapped=swapped, seed=seed,
        ),
        measures={name: interval(values) for name, values in measured.items()},
    )  # fmt: skip


def _words(fit: Examples, rows: Examples, seed: int) -> dict[str, np.ndarray]:
    """Scores of what sees text only: the completion, the prompt, and both."""
    labels, groups = fit.labels, fit.groups
    found = {"tfidf": baselines.tfidf(fit.texts, labels, rows.texts, groups, seed)}
    if any(rows.prompts) and any(fit.prompts):
        found["tfidf_prompt"] = baselines.tfidf(fit.prompts, labels, rows.prompts, groups, seed)
        both = ([f"{p}\n{t}" for p, t in zip(e.prompts, e.texts, strict=True)] for e in (fit, rows))
        found["tfidf_both"] = baselines.tfidf(next(both), labels, next(both), groups, seed)
    else:
        found["tfidf_prompt"], found["tfidf_both"] = np.zeros(len(rows)), found["tfidf"]
    return found | {
        "length": baselines.length(fit.texts, labels, rows.texts),
        "punctuation": baselines.punctuation(fit.texts, labels, rows.texts),
    }


def _control(aurocs: np.ndarray) -> Control:
    p95 = float(np.percentile(aurocs, 95))
    return Control(mean=round(float(aurocs.mean()), 4), p95=round(p95, 4), repeats=len(aurocs))
