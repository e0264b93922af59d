"""From a trainer and a `DriftConfig` to an `Evaluation`: what belongs together is checked here.

In: a built trainer, settings, monitors. Out: an `Evaluation` that fits the trainer's model. It must not know the run log.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import has_adapters, predicts
from ..activations.reference_pass import require_reference_below
from ..concepts.examples import load_examples
from ..concepts.readout import Readout
from ..messages import as_list
from ..sae.files import load_sae
from .evaluation import Evaluation
from .own_text import OwnText

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..concepts.examples import Examples
    from ..sae.autoencoder import SparseAutoencoder
    from .config import DriftConfig


def evaluation_of(
    trainer: Any,
    config: DriftConfig,
    monitors: Any = (),
    pressure: Mapping[str, int] | None = None,
    holdouts: Mapping[str, int] | None = None,
    reference: Any = None,
) -> Evaluation:
    """The evaluation of a trainer's policy.

    Args:
        monitors (`Sequence`): cards or readouts.
        pressure, holdouts (`dict[str, int]`): as in `DriftCallback`.
        reference (`nn.Module`, *optional*): the frozen reference; by default that of the trainer.

    Raises:
        `ValueError`: monitors, hook points, texts or prompts that do not fit the model.
    """
    model = trainer.model
    readouts = [one if isinstance(one, Readout) else Readout.from_card(one) for one in as_list(monitors)]
    for readout in readouts:
        readout.check_model(model, exact=False, trained=trainer.state.global_step > 0)
    _check_names([readout.name for readout in readouts], {*(pressure or {}), *(holdouts or {})})
    sae = _autoencoder(config.sae, model)
    if trainer.processing_class is None:
        raise ValueError(
            "The trainer's `processing_class` is None – expected the model's tokenizer: drift is read on texts. Pass it to "
            "the trainer."
        )
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    chat = {name: getattr(trainer, name, None) for name in ("chat_template", "chat_template_kwargs")}
    ends = end_of_turn_ids(model, tokenizer, chat["chat_template"])
    evaluation = Evaluation(
        model, tokenizer, readouts, texts=config.texts, hook_points=config.hook_points, labelled=_examples(config.labelled),
        sae=sae, seed=config.seed, end_of_turn_ids=ends, chat=chat, pressure=pressure, holdouts=holdouts,
    )  # fmt: skip
    evaluation.check(model)
    if config.prompts:
        evaluation.own_text = _own_text(trainer, config, config.prompts, evaluation, reference, ends, chat)
    return evaluation


def _check_names(names: list[str], others: set[str]) -> None:
    if wrong := sorted({name for name in names if names.count(name) > 1} | (others - {*names})):
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in wrong)} in `monitors`, `pressure` or `holdouts` – expected each monitor once, "
            f"and no other names than theirs: {', '.join(f'`{name}`' for name in sorted(set(names))) or 'there are none'}."
        )


def _examples(labelled: str | Path | Examples | None) -> Examples | None:
    return load_examples(labelled) if isinstance(labelled, str | Path) else labelled


def _own_text(
    trainer: Any, config: DriftConfig, prompts: Sequence[Any], evaluation: Evaluation, reference: Any, ends: set[int],
    chat: Mapping[str, Any],
) -> OwnText:  # fmt: skip
    if not predicts(trainer.model):
        raise ValueError(
            f"`prompts` are given and `{type(trainer.model).__name__}` has no language-model head – expected none: it answers "
            "nothing. Leave them out; activations, monitors and labelled examples are still read."
        )
    reference = reference if reference is not None else getattr(trainer, "ref_model", None)
    if reference is None and has_adapters(trainer.model):
        require_reference_below(trainer.model)
    return OwnText(
        trainer, prompts, evaluation.monitors, config.measures or {}, reference, ends, config.max_new_tokens,
        seed=config.seed, chat=chat, sae=evaluation.sae,
    )  # fmt: skip


def _autoencoder(sae: str | Path | SparseAutoencoder | None, model: Any) -> SparseAutoencoder | None:
    if sae is None:
        return None
    loaded = load_sae(sae, model=model) if isinstance(sae, str | Path) else sae
    loaded.check_model(model)
    if loaded.spec.output_point is not None:
        raise ValueError(
            f"`sae` is a transcoder from `{loaded.spec.hook_point}` to `{loaded.spec.output_point}` – expected an autoencoder of "
            "one place. Its latents can be monitors: `probe fit --kind sae_latents`."
        )
    return loaded
