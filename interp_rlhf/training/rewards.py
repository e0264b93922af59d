"""Concept rewards: a card's readout as a TRL reward function.

In: what TRL passes to reward functions. Out: one float or `None` per completion. It runs no model itself. The rollout does,
unless a pass of the trainer can be used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from ..concepts.card import load_card
from ..concepts.readout import Readout
from ..validation.gate import require_passed
from .dense import kind_of, negated, per_token, shuffled

if TYPE_CHECKING:
    from pathlib import Path

    from ..concepts.card import LoadedCard
    from .rollout import Reader, Rollout

SHAMS = ("shuffle",)


class ConceptReward:
    """A concept score as a TRL reward function. `attach` binds it to its trainer.

    The score is read on the frozen reference model over the policy's text (Features as Rewards, arXiv 2602.10067). The policy's
    activations cannot move it; its text can. A policy can still learn to write text that pleases the probe, so watch a holdout
    monitor and an independent measure too.

    Args:
        readout (`Readout`): the concept.
        role (`str`, defaults to `"reward"`): `reward`, or `penalty`: the score is subtracted.
        reader (`str`, defaults to `"reference"`): which model is read: `reference`, `policy`, or `both`: the
            reward is read on the reference, and the difference policy − reference is logged as `interp/<name>/drift`.
        weight (`float`, defaults to 1): `attach` applies it if the trainer's `reward_weights` are not set.
        sham (`str`, *optional*): `shuffle` gives the scores of a batch to its completions at random. This control arm
            has a reward of the same distribution without meaning.
        seed (`int`, defaults to 0): of the sham.
        card (`LoadedCard`, *optional*): the card of the readout.
        dense (`bool` or `str`, defaults to `False`): for `PPOTrainer`: a reward at each completion token, read at that token's
            position. `True` or `score`: the token's score, by the readout's calibration and transform. `share`: this score
            divided by the number of counted tokens, so that a completion's total is the mean. `ema`: the difference of a moving
            average.
        shaping (`bool`, defaults to `False`): for `PPOTrainer`: the score is a potential Φ. The reward is γ Φ(s') − Φ(s), with
            Φ = 0 at the end of the completion, so no optimal policy changes.

    Raises:
        `ValueError`: an unknown option, or a `weight` that is not a finite number.

    Example:
        >>> from interp_rlhf import ConceptReward, attach
        >>> reward = ConceptReward.from_card("warmth.yaml")
        >>> grpo_trainer.reward_funcs.append(reward)  # usually passed to the constructor
        >>> reward.role, reward.reader, reward.readout.hook_point
        ('reward', 'reference', 'model.layers.1')
    """

    def __init__(
        self,
        readout: Readout,
        *,
        role: Literal["reward", "penalty"] = "reward",
        reader: Literal["reference", "policy", "both"] = "reference",
        weight: float = 1.0,
        sham: str | None = None,
        seed: int = 0,
        card: LoadedCard | None = None,
        dense: bool | str = False,
        shaping: bool = False,
    ):
        if sham is not None and sham not in SHAMS:
            raise ValueError(f"`sham` is {sham!r} – expected one of {', '.join(SHAMS)}, or None.")
        if not isinstance(readout, Readout):
            raise ValueError(
                f"`readout` is {str(readout)!r} – expected a `Readout`. Use `ConceptReward.from_card(path)` for a card."
            )
        for name, value, known in (
            ("role", role, ("reward", "penalty")), ("reader", reader, ("reference", "policy", "both")),
        ):  # fmt: skip
            if value not in known:
                words = ", ".join(f"`{word}`" for word in known)
                raise ValueError(f"`{name}` of `ConceptReward` is {value!r} – expected one of {words}.")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"`weight` of `ConceptReward` is {weight!r} – expected a finite number.")
        self.readout = readout
        self.role, self.reader, self.weight = role, reader, weight
        self.sham, self.seed = sham, seed
        self.per_token, self.shaping = kind_of(dense, shaping), shaping
        self.card = card
        self.__name__ = readout.name
        self._rollout: Rollout | None = None

    @classmethod
    def from_card(
        cls,
        path: str | Path,
        *,
        sham: str | None = None,
        seed: int = 0,
        dense: bool | str = False,
        shaping: bool = False,
        require_causal: bool = False,
    ) -> ConceptReward:
        """The reward that a card describes.

        Args:
            path (`str` or `Path`): a card with the role `reward` or `penalty` and evidence that passes the gate.
            sham (`str`, *optional*), seed (`int`), dense (`bool` or `str`), shaping (`bool`): see the class.
            require_causal (`bool`, defaults to `False`): refuse a card whose causal check does not say `causal`, see
                `validation.gate.gate` for when to ask for it.

        Raises:
            `ValueError`: a monitor, a card without sufficient evidence, or an artifact that is not the card's.
        """
        loaded = load_card(path)
        card = loaded.card
        if card.role == "monitor":
            raise ValueError(
                f"`{path}` has the role `monitor` – expected `reward` or `penalty`. Pass it to "
                "`attach(trainer, monitors=[…])` instead."
            )
        require_passed(card, path, require_causal)
        readout = Readout.from_card(loaded)
        if readout.canaries is None:
            raise ValueError(
                f"The artifact of `{path}` has no canaries, which prove that the reference is the model that the card was fitted "
                f"on – expected them in a {card.role}. Run `interp-rlhf probe canaries {path}`, or use it as a monitor."
            )
        return cls(
            readout, role=card.role, reader=card.reader, weight=card.weight, sham=sham, seed=seed, card=loaded, dense=dense,
            shaping=shaping,
        )  # fmt: skip

    @property
    def readers(self) -> list[Reader]:
        """The models to read: `reference`, `policy` or both."""
        return ["reference", "policy"] if self.reader == "both" else [self.reader]

    def bind(self, rollout: Rollout | None) -> None:
        """Set the rollout that is read. `attach` calls it; None takes it off."""
        self._rollout = rollout

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
        """One score per completion, or a list with one per token; `None` for a completion without a counted token.

        Raises:
            `RuntimeError`: not attached, or asked about other completions than those that were generated.
            `ValueError`: a score that is not finite.
        """
        rollout = self._rollout
        if rollout is None or rollout.completion_ids is None:
            raise RuntimeError(
                f"`ConceptReward` `{self.__name__}` is not attached to a trainer – expected, after the trainer is built and "
                "before `trainer.train()`:\n    from interp_rlhf import attach\n    attach(trainer)"
            )
        if list(completion_ids) != list(rollout.completion_ids):
            raise RuntimeError(
                f"`ConceptReward` `{self.__name__}` was asked about {len(completion_ids)} completions that are not the "
                "trainer's current ones – expected exactly the ids that were generated. Call it through the trainer it "
                "is attached to."
            )
        values = rollout.values(self.readout, self.readers[0])
        if self.reader == "both":
            self._log_drift(rollout, values, kwargs["log_metric"])
        if self.per_token is not None:
            return self._per_token(rollout, kwargs["trainer_state"].global_step)
        if self.role == "penalty":
            values = [None if value is None else -value for value in values]
        if not self.sham:
            return values
        seed = self._seed_at(kwargs["trainer_state"].global_step)
        rows = shuffled([None if value is None else [value] for value in values], seed)
        return [None if row is None else row[0] for row in rows]

    def _seed_at(self, step: int) -> str:
        """Seed of the sham at a step, the same on all ranks and in a resumed run."""
        return f"{self.seed}-{step}"

    def _per_token(self, rollout: Rollout, step: int) -> list[list[float] | None]:
        assert self.per_token is not None
        assert rollout.completion_ids is not None
        scores = rollout.scores(self.readout, self.readers[0])
        lengths = [len(ids) for ids in rollout.completion_ids]
        values = per_token(self.readout, scores, rollout.attention_mask, lengths, self.per_token)
        if self.role == "penalty":
            values = negated(values)
        return shuffled(values, self._seed_at(step)) if self.sham else values

    def _log_drift(self, rollout: Rollout, reference: list[float | None], log_metric: Any) -> None:
        policy = rollout.values(self.readout, "policy")
        pairs = [(p, r) for p, r in zip(policy, reference, strict=True) if p is not None and r is not None]
        for p, r in pairs:  # one by one: TRL averages over what all ranks have logged
            log_metric(f"interp/{self.__name__}/drift", p - r)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rollout": None}  # a trainer does not pickle
