"""`probe check`: a card's readout on data that its fit did not see, compared with controls.

In: a card, the model, the fit's examples, other examples, optionally the model's own completions. Out: `Evidence`. It must not
know how the evidence is judged: `gate` does that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.batch import tokenize_examples
from ..activations.counted import end_of_turn_ids
from ..concepts.artifact import library_versions, strength_of
from ..concepts.card import Control, Evidence, Findings
from ..concepts.fitting import require_bare
from ..concepts.readout import Readout
from ..sae.autoencoder import random_dictionary
from . import baselines
from .added import added
from .controls import PERMUTATIONS
from .dictionaries import RandomDictionaries, all_mean_latents, permuted_choices, sae_findings
from .findings import added_finding, calibration_finding, estimate, prompt_finding
from .overlap import require_apart
from .probes import CheckProbes
from .prompts import read_swapped
from .slices import findings_by_group
from .statistics import auroc_interval, auroc_within, weighted_aurocs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..activations.batch import TokenBatch
    from ..concepts.card import Estimate, LoadedCard
    from ..concepts.examples import Examples
    from ..sae.autoencoder import SparseAutoencoder
    from .probes import CheckRead
    from .prompts import Swapped

logger = logging.getLogger(__name__)

CHECKED_DICTIONARIES = 5
NAMED = 3  # number of near-duplicates that a warning names


def check_card(
    card: LoadedCard, model: Any, tokenizer: Any, fit_examples: Examples, examples: Examples, *,
    completions: Examples | None = None, measures: Mapping[str, Callable[[str], float]] | None = None,
    sae: SparseAutoencoder | None = None, seed: int = 0, command: str = "", chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None, progress: bool = False,
) -> Evidence:  # fmt: skip
    """Evidence for a card: what its probe adds to text baselines and to the model's likelihood, and the controls it must beat.

    The model reads the fit's examples up to the hook point. It reads the other examples once as a whole, and up to 60 answers
    under other prompts.

    Args:
        card (`LoadedCard`): the card to check.
        model (`nn.Module`), tokenizer: the reference model.
        fit_examples (`Examples`): the examples that the artifact was fitted on, by their fingerprint. Controls and baselines are
            fitted on them.
        examples (`Examples`): held-out examples. They share no row and no prompt with the fit, in any form.
        completions (`Examples`, *optional*): the model's own answers, labelled by an independent measure or by hand.
        measures (`dict[str, Callable]`, *optional*): independent measures of a text, reported next to the probe.
        sae (`SparseAutoencoder`, *optional*): for a card of latents: the whole autoencoder that they were taken from.
        seed (`int`, defaults to 0): seed of permutations, directions, dictionaries, folds and bootstrap.
        command (`str`): the command that the evidence names.
        chat_template (`str`), chat_template_kwargs (`dict`, *optional*): how messages become text.
        progress (`bool`): show progress bars.

    Returns:
        `Evidence`: findings on the held-out examples and on the completions.

    Raises:
        `ValueError`: other fit data than the artifact's, held-out rows that the fit has seen, a measure that gives no number, or
            another autoencoder.

    Example:
        >>> from interp_rlhf import check_card, load_card, load_examples
        >>> card = load_card("warmth.yaml")
        >>> check_card(card, model, tokenizer, examples, examples)
        Traceback (most recent call last):
        ValueError: The fit data have fingerprint ...
    """
    readout = Readout.from_card(card)
    require_bare(model)
    readout.check_model(model)
    _require_fit_data(readout, fit_examples)
    sets = {"held-out examples": examples} | ({} if completions is None else {"completions": completions})
    near = {what: require_apart(fit_examples, rows, what) for what, rows in sets.items()}
    measured = {what: _measures_of(measures or {}, rows, what) for what, rows in sets.items()}
    _require_its_sae(readout, sae)
    tokens = _Tokenizer(model, tokenizer, chat_template, chat_template_kwargs, readout.include_end_of_turn)
    check = _Check.fitted(model, readout, tokens, fit_examples, sae, seed, progress)
    findings = {what: check.findings(what, rows, measured[what], near[what]) for what, rows in sets.items()}
    return Evidence(
        readout=card.card.readout_digest, held_out=findings["held-out examples"], completions=findings.get("completions"),
        seed=seed, command=command, versions=library_versions(),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Tokenizer:
    """Makes batches of examples as the card's readout counts their tokens."""

    model: Any
    tokenizer: Any
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    include_end_of_turn: bool

    def __call__(self, rows: Examples) -> TokenBatch:
        ends = end_of_turn_ids(self.model, self.tokenizer, self.chat_template)
        batch = tokenize_examples(
            rows.rows, self.tokenizer, self.chat_template, self.chat_template_kwargs, ends, self.include_end_of_turn
        )
        if not batch.completion_mask.any(1).all():
            row = int((~batch.completion_mask.any(1)).nonzero()[0])
            raise ValueError(f"Row {row} has no token that counts – expected a completion. Remove it.")
        return batch


@dataclass(frozen=True, eq=False)
class _Check:
    """A card's readout with the probes and controls that were fitted on the fit's examples."""

    model: Any
    readout: Readout
    tokens: _Tokenizer
    fit: Examples
    probes: CheckProbes
    sae: SparseAutoencoder | None
    dictionaries: RandomDictionaries | None
    seed: int
    progress: bool

    @classmethod
    def fitted(
        cls, model: Any, readout: Readout, tokens: _Tokenizer, fit: Examples, sae: SparseAutoencoder | None, seed: int,
        progress: bool,
    ) -> _Check:  # fmt: skip
        """Fit everything that does not need the held-out examples."""
        label = "reading the fit's examples" if progress else None
        batch = tokens(fit)
        permuted = dictionaries = None
        if sae is not None and readout.latents is not None and readout.header is not None:
            count, method, strength = readout.latents.size, readout.header.method, strength_of(readout.header)
            of_all = all_mean_latents(model, batch, [sae], label)[0]
            permuted = permuted_choices(of_all, fit.labels, sae, count, method, strength, seed)
            l0 = sae.spec.k or sae_findings(model, batch, sae, progress).l0
            drawn = [random_dictionary(sae, seed + i, max(1, round(l0))) for i in range(CHECKED_DICTIONARIES)]
            dictionaries = RandomDictionaries(model, batch, fit.labels, drawn, count, method, strength, progress)
        probes = CheckProbes.on(model, batch, fit, readout, seed, permuted, label)
        return cls(model, readout, tokens, fit, probes, sae, dictionaries, seed, progress)

    def findings(
        self, what: str, rows: Examples, measured: Mapping[str, np.ndarray], near: list[tuple[int, int, float]]
    ) -> Findings:
        """Findings on some examples.

        Args:
            what (`str`): their name in messages.
            measured (`dict[str, np.ndarray]`): values (N,) of each independent measure.
            near (`list`): near-duplicates of the fit's rows, see `Overlap.near`.
        """
        batch = self.tokens(rows)
        read = self.probes.read(self.model, batch, self.readout, f"reading the {what}" if self.progress else None)
        swapped = read_swapped(
            self.model,
            rows,
            read.card,
            self.tokens,
            self.readout,
            self.seed,
            "swapped prompts" if self.progress else None,
        )
        findings = _findings(rows, self.fit, read, swapped, measured, self.seed)
        _warn_of_near(near, what)
        updates: dict[str, Any] = {"near_duplicates": len(near)}
        if self.dictionaries is not None and self.sae is not None:
            drawn = self.dictionaries.scores(self.model, batch, self.readout.pooling, self.progress)
            updates["random_dictionary"] = _control(_aurocs(rows.labels, drawn))
            updates["sae"] = sae_findings(self.model, batch, self.sae, self.progress)
        return findings.model_copy(update=updates)


def _require_fit_data(readout: Readout, fit: Examples) -> None:
    assert readout.header is not None
    if readout.header.data != fit.fingerprint:
        raise ValueError(
            f"The fit data have fingerprint {fit.fingerprint} – the artifact was fitted on {readout.header.data}. Pass the very "
            "file (and `positive` label) that `probe fit` was given."
        )


def _warn_of_near(near: list[tuple[int, int, float]], what: str) -> None:
    if near:
        shown = ", ".join(f"{row} and {other} of the fit ({same:.2f})" for row, other, same in near[:NAMED])
        logger.warning(
            "%d rows of the %s are nearly rows of the fit: %s%s. The evidence counts them; remove them for a cleaner one.",
            len(near), what, shown, " …" if len(near) > NAMED else "",
        )  # fmt: skip


def _require_its_sae(readout: Readout, sae: SparseAutoencoder | None) -> None:
    """Raises `ValueError` for a card of latents without the autoencoder that they were taken from."""
    if readout.latents is None:
        if sae is not None:
            raise ValueError(f"`sae` was given and `{readout.name}` is not a card of latents – expected no `sae`.")
        return
    assert readout.header is not None
    indices = readout.header.sae["latents"]
    if (
        sae is None
        or max(indices) >= sae.size
        or not torch.equal(sae.latents(indices).chosen.cpu(), readout.latents.chosen.cpu())
    ):
        passed = "no `sae`" if sae is None else f"an autoencoder of {sae.size} other latents"
        raise ValueError(
            f"`{readout.name}` reads latents {indices} of {readout.header.sae['source']} and the check got {passed} – expected "
            "that autoencoder: its explained variance and random dictionaries of its shape are part of the evidence. Pass it "
            "(`--sae`)."
        )


def _measures_of(measures: Mapping[str, Callable[[str], float]], rows: Examples, what: str) -> dict[str, np.ndarray]:
    """Values (N,) of every measure.

    Raises:
        `ValueError`: a measure gives no number for a text.
    """
    by_name = {
        name: np.array([measure(text) for text in rows.texts], dtype=float) for name, measure in measures.items()
    }
    for name, values in by_name.items():
        if (bad := np.flatnonzero(np.isnan(values))).size:
            raise ValueError(
                f"The measure `{name}` gives no number for {bad.size} of {len(rows)} {what}, the first is row {bad[0]} – "
                "expected one for every text: a row without a number has no rank. Remove these rows, or let the measure give a "
                "number."
            )
    return by_name


def _findings(
    rows: Examples,
    fit: Examples,
    read: CheckRead,
    swapped: Swapped | None,
    measured: Mapping[str, np.ndarray],
    seed: int,
) -> Findings:
    labels, groups = rows.labels, rows.groups

    def interval(scores: np.ndarray) -> Estimate:
        return estimate(auroc_interval(labels, scores, groups, seed))

    controls = _aurocs(labels, read.controls)
    words = _words(fit, rows, seed)
    has_prompts = any(rows.prompts)
    others = {
        **words, "embedding": read.embedding, **({"prompt_probe": read.prompt} if has_prompts else {}),
        **{f"likelihood_{how}": values for how, values in read.likelihood.items()},
    }  # fmt: skip
    within = auroc_within(labels, read.card, groups, seed)
    return Findings(
        data=rows.fingerprint,
        examples=len(rows),
        positives=int(labels.sum()),
        adds=added_finding(added(labels, read.card, others, groups, seed)),
        probe=interval(read.card),
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
        by_group=findings_by_group(labels, read.card, read.log_odds, groups, rows.slices, seed) if rows.slices else None,
    )  # fmt: skip


def _words(fit: Examples, rows: Examples, seed: int) -> dict[str, np.ndarray]:
    """Scores of baselines that see text only: the completion, the prompt, and both."""
    labels, groups = fit.labels, fit.groups
    scores = {"tfidf": baselines.tfidf(fit.texts, labels, rows.texts, groups, seed)}
    if any(rows.prompts) and any(fit.prompts):
        scores["tfidf_prompt"] = baselines.tfidf(fit.prompts, labels, rows.prompts, groups, seed)
        both = ([f"{p}\n{t}" for p, t in zip(e.prompts, e.texts, strict=True)] for e in (fit, rows))
        scores["tfidf_both"] = baselines.tfidf(next(both), labels, next(both), groups, seed)
    else:
        scores["tfidf_prompt"], scores["tfidf_both"] = np.zeros(len(rows)), scores["tfidf"]
    return scores | {
        "length": baselines.length(fit.texts, labels, rows.texts),
        "punctuation": baselines.punctuation(fit.texts, labels, rows.texts),
    }


def _control(aurocs: np.ndarray) -> Control:
    p95 = float(np.percentile(aurocs, 95))
    return Control(mean=round(float(aurocs.mean()), 4), p95=round(p95, 4), repeats=len(aurocs))


def _aurocs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AUROC of every column of (N, C)."""
    once = np.ones((1, len(labels)))
    return np.array([weighted_aurocs(labels, column, once)[0] for column in scores.T])
