"""`probe check`: a card's readout on data that its fit did not see, beside the controls that it must beat.

In: a card, the model, the fit's examples, other examples, optionally the model's own completions. Out: `Evidence`. Every
probe here, real or control, is read at the positions and with the pooling that the reward will use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..activations import embedding_point, end_of_turn_ids, read, read_means, tokenize_examples
from ..concepts.artifact import library_versions
from ..concepts.card import Control, Estimate, Evidence, Findings, LoadedCard
from ..concepts.examples import Examples
from ..concepts.latents import Latents
from ..concepts.pooling import pool
from ..concepts.probe import LinearProbe, require_bare
from ..concepts.readout import Readout
from ..concepts.sae.autoencoder import SparseAutoencoder
from . import baselines
from .dictionaries import PERMUTATIONS, RandomDictionaries, all_mean_latents, permuted_choices, sae_findings
from .statistics import auroc_interval, weighted_aurocs

RANDOM_DIRECTIONS = 200
CHUNK_ROWS = 256


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
    """Evidence for a card.

    Args:
        card (`LoadedCard`): what is claimed.
        model (`nn.Module`), tokenizer: the reference model.
        fit_examples (`Examples`): what the artifact was fitted on; its fingerprint must be the artifact's. The controls
            are fitted on it.
        examples (`Examples`): held out: shares no row with the fit.
        completions (`Examples`, *optional*): the model's own answers, labelled by an independent measure or by hand.
        measures (`dict[str, Callable]`, *optional*): independent measures of a text, reported beside the probe.
        sae (`SparseAutoencoder`, *optional*): of a card of latents: the whole autoencoder that they were taken from.
        seed (`int`, defaults to 0): of permutations, directions, dictionaries and bootstrap.
        command (`str`): what the evidence says produced it.
        progress (`bool`): show progress bars.

    Raises:
        `ValueError`: other fit data than the artifact's, held-out rows that the fit has seen, or another autoencoder.
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

    def tokens(rows: Examples) -> Any:
        ends = end_of_turn_ids(model, tokenizer, chat_template)
        return tokenize_examples(
            rows.rows, tokenizer, chat_template, chat_template_kwargs, ends, readout.include_end_of_turn
        )

    _require_its_sae(readout, sae)
    embedding = embedding_point(model)
    points = [readout.hook_point, embedding]
    label = "reading the fit's examples" if progress else None
    fit_batch = tokens(fit_examples)
    means = {k: v.double().numpy() for k, v in read_means(model, fit_batch, points, progress=label).items()}
    permuted = None
    dictionaries = None
    if readout.latents is not None and sae is not None:
        of_all = all_mean_latents(model, fit_batch, [sae], label)[0]
        permuted = permuted_choices(of_all, fit_examples.labels, sae, readout.latents.size, header.method, seed)
        l0 = sae.spec.k or sae_findings(model, fit_batch, sae, progress).l0
        dictionaries = RandomDictionaries(
            model, fit_batch, fit_examples.labels, sae, readout.latents.size, l0, header.method, seed, progress
        )
    controls = Controls(readout, means[readout.hook_point], fit_examples.labels, seed, permuted)
    embedding_probe = LinearProbe(header.method).fit(means[embedding], fit_examples.labels)

    def findings(rows: Examples, what: str) -> Findings:
        shared = rows.keys & fit_examples.keys
        if shared:
            raise ValueError(
                f"{len(shared)} rows of the {what} are among the fit's examples – expected data that the fit did not "
                "see. Remove them."
            )
        if prompts := set(rows.groups) & set(fit_examples.groups):
            raise ValueError(
                f"{len(prompts)} prompts of the {what} are prompts of the fit – expected other prompts: answers to one prompt "
                "are alike, and the probe may know the prompt. Remove them."
            )
        batch = tokens(rows)
        found = _findings(
            model, batch, rows, fit_examples, readout, controls, (embedding, embedding_probe), measures or {}, seed,
            f"reading the {what}" if progress else None,
        )  # fmt: skip
        if dictionaries is None or sae is None:
            return found
        drawn = dictionaries.scores(model, batch, readout.pooling, progress)
        random = _control(np.array([weighted_aurocs(rows.labels, c, np.ones((1, len(rows))))[0] for c in drawn.T]))
        return found.model_copy(update={"random_dictionary": random, "sae": sae_findings(model, batch, sae, progress)})

    return Evidence(
        readout=card.card.readout_digest,
        held_out=findings(examples, "held-out examples"),
        completions=None if completions is None else findings(completions, "completions"),
        seed=seed,
        command=command,
        versions=library_versions(),
    )


class Controls:
    """Probes that know nothing, all in one readout: refitted on permuted labels, and random directions.

    Random directions are drawn in the standardized space in which probes are fitted (in the raw one, the few dimensions
    with massive activations would decide alone) and get the better sign on the fit's examples: the same chance to be
    right by luck that the probe had.

    Args:
        permuted (`tuple[Latents, np.ndarray]`, *optional*): of a card of latents: see `permuted_choices`.
    """

    name = "controls"

    def __init__(
        self,
        readout: Readout,
        means: np.ndarray,
        labels: np.ndarray,
        seed: int,
        permuted: tuple[Latents, np.ndarray] | None = None,
    ):
        self.hook_point = readout.hook_point
        self.pooling = readout.pooling
        rng = np.random.default_rng(seed)
        self.latents: Latents | None = None
        if permuted is not None:
            self.latents, weights = permuted
        else:
            probe = LinearProbe(readout.header.method if readout.header else "logistic_regression")
            weights = np.stack([probe.fit(means, rng.permutation(labels))[0] for _ in range(PERMUTATIONS)])
        spread = means.std(0)
        directions = rng.standard_normal((RANDOM_DIRECTIONS, means.shape[1])) / np.where(spread > 0, spread, np.inf)
        gaps = directions @ (means[labels == 1].mean(0) - means[labels == 0].mean(0))
        directions *= np.where(gaps >= 0, 1.0, -1.0)[:, None]
        self.permuted, self.directions = _columns(weights), _columns(directions)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        read = activation if self.latents is None else self.latents(activation)
        return torch.cat([read @ self.permuted.to(read), activation @ self.directions.to(activation)], dim=-1)


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


def _findings(
    model: Any,
    batch: Any,
    rows: Examples,
    fit_examples: Examples,
    readout: Readout,
    controls: Controls,
    embedding: tuple[str, tuple[np.ndarray, float]],
    measures: Mapping[str, Callable[[str], float]],
    seed: int,
    progress: str | None,
) -> Findings:
    labels = rows.labels
    if not batch.completion_mask.any(1).all():
        row = int((~batch.completion_mask.any(1)).nonzero()[0])
        raise ValueError(f"Row {row} has no token that counts – expected a completion. Remove it.")
    own, drawn = _read_in_chunks(model, batch, readout, controls, progress)
    point, (weight, _) = embedding
    lexical = read_means(model, batch, [point])[point].double().numpy() @ weight
    once = np.ones((1, len(labels)))
    control_aurocs = np.array([weighted_aurocs(labels, column, once)[0] for column in drawn.T])
    train, test = fit_examples.texts, rows.texts

    def estimate(scores: np.ndarray) -> Estimate:
        auroc, low, high = auroc_interval(labels, scores, rows.groups, seed)
        return Estimate(auroc=round(auroc, 4), low=round(low, 4), high=round(high, 4))

    return Findings(
        data=rows.fingerprint,
        examples=len(rows),
        positives=int(labels.sum()),
        probe=estimate(own),
        permutation=_control(control_aurocs[:PERMUTATIONS]),
        random_direction=_control(control_aurocs[PERMUTATIONS:]),
        tfidf=estimate(baselines.tfidf(train, fit_examples.labels, test)),
        length=estimate(baselines.length(train, fit_examples.labels, test)),
        punctuation=estimate(baselines.punctuation(train, fit_examples.labels, test)),
        embedding=estimate(lexical),
        measures={name: estimate(np.array([measure(text) for text in test])) for name, measure in measures.items()},
    )


def _read_in_chunks(
    model: Any, batch: Any, readout: Readout, controls: Controls, progress: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled scores of the probe (N,) and of the controls (N, K): per-token scores of K controls never pile up."""
    own: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    for start in range(0, len(batch), CHUNK_ROWS):
        part = batch.part(slice(start, start + CHUNK_ROWS))
        scores = read(model, part, [readout, controls], reader="reference", progress=progress)
        own.append(np.array(readout.score(scores[readout.name]), dtype=float))
        drawn.append(pool(scores[controls.name].scores, part.completion_mask, controls.pooling).double().numpy())
    return np.concatenate(own), np.concatenate(drawn)


def _control(aurocs: np.ndarray) -> Control:
    p95 = float(np.percentile(aurocs, 95))
    return Control(mean=round(float(aurocs.mean()), 4), p95=round(p95, 4), repeats=len(aurocs))
