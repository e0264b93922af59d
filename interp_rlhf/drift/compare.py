"""Drift between two checkpoints, without a run: the evaluation of the callback, offline.

In: two models (a base and a tuned one, or an adapter and its base). Out: a `drift` event and its verdict, and which limits are
crossed. It must not know trainers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import has_adapters
from ..activations.loading import adapter_base, has_tokenizer, load_model, load_tokenizer
from ..concepts.card import load_card
from ..concepts.examples import read_rows
from ..concepts.readout import Readout
from ..messages import as_list
from ..registry import did_you_mean
from .evaluation import Evaluation
from .patching_between import patching_between, tuned_model
from .verdicts import TABLE, evidence_of, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.examples import Examples
    from ..runlog.events import DriftEvent
    from .start import Observation
    from .verdicts import Verdict


def compare_checkpoints(
    before: str,
    after: str,
    *,
    texts: Sequence[Any] | None = None,
    hook_points: Sequence[str] | None = None,
    monitors: Sequence[str] = (),
    labelled: Examples | None = None,
    pairs: Sequence[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[DriftEvent, Verdict]:
    """Compare two checkpoints. One model is loaded after the other, so that only one is in memory.

    Args:
        before (`str`), after (`str`): folders or Hub ids. Either may be a folder with a PEFT adapter. The adapter of `after` must
            belong to `before`, or to its base.
        monitors (`Sequence[str]`): cards. The other arguments are as in `DriftConfig`.
        pairs (`list[dict]`, *optional*): contrast pairs, see `patching_between`; for these both models are in memory.
        progress (`bool`, defaults to `True`): whether a bar is shown.

    Returns:
        `tuple[DriftEvent, Verdict]`: the `drift` event and its verdict. Intervals are bootstraps over the labelled examples.

    Raises:
        `ValueError`: models that cannot be compared (another tokenizer, vocabulary, width or base), monitors of another model.
    """
    readouts = [Readout.from_card(load_card(path)) for path in as_list(monitors)]
    if readouts and labelled is None:
        raise ValueError(
            f"{len(readouts)} monitors and no `labelled` examples – expected examples to read them on. Pass `--labelled`."
        )
    _require_its_base(before, after)
    tokenizer = _tokenizer_of(before, after)
    observed: list[Observation] = []
    evaluation: Evaluation | None = None
    with tqdm(total=2, desc="Models", disable=not progress, leave=False) as bar:
        for side in (before, after):
            model = tuned_model(before, after) if side == after else load_model(before)
            if evaluation is None:
                for readout in readouts:  # the model below A's adapters, if it has some
                    readout.check_model(model, exact=not has_adapters(model))
                evaluation = Evaluation(
                    model, tokenizer, readouts, texts=None if texts is None else as_list(texts),
                    hook_points=as_list(hook_points), labelled=labelled, seed=seed,
                    end_of_turn_ids=end_of_turn_ids(model, tokenizer),
                )  # fmt: skip
            evaluation.check(model)
            for readout in readouts:
                readout.check_model(model, exact=False, trained=True)
            observed.append(evaluation.observe(evaluation.read(model), observed[0] if observed else None))
            del model
            bar.update()
    assert evaluation is not None
    _require_comparable(dict(zip((before, after), observed, strict=True)))
    event = replace(evaluation.compare(observed[0], observed[1]), before=before, after=after)
    if pairs is not None:
        event = replace(event, patching=patching_between(before, after, tokenizer, pairs, seed, progress))
    return event, judge(evidence_of(event))


def loaded_second(before: str, after: str) -> tuple[Any, Any]:
    """The second model of a comparison, and its tokenizer."""
    return tuned_model(before, after), _tokenizer_of(before, after)


def _require_comparable(sides: dict[str, Observation]) -> None:
    """Raise `ValueError` if widths or vocabularies differ."""
    widths = {
        side: next(iter(one.snapshot.activations.values())).shape[1] for side, one in sides.items()
    }  # fmt: skip
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"The models have widths {widths} – expected one width: activations cannot be compared. Compare "
            "models of one architecture."
        )
    words = {side: one.snapshot.predictions.shape[1] for side, one in sides.items()}
    if len(set(words.values())) > 1:
        raise ValueError(
            f"The models predict over {words} tokens – expected one vocabulary: predictions cannot be compared. Resize the "
            "embedding of one model to the size of the other."
        )


@dataclass(frozen=True)
class Limits:
    """Limits that must not be crossed.

    Attributes:
        above, below (`dict[str, float]`): name of a number to its highest, and to its lowest value.
        verdicts (`list[str]`): verdicts that count as crossed.
    """

    above: dict[str, float]
    below: dict[str, float]
    verdicts: list[str]


def parse_limits(above: Sequence[str], below: Sequence[str], verdicts: Sequence[str]) -> Limits:
    """Limits as the command line writes them, `kl=0.5`.

    Raises:
        `ValueError`: not `name=number`, or not a verdict that two checkpoints can get.
    """
    # These two need a training that pushes, rewards and samples.
    known = [rule.name for rule in TABLE if rule.name not in ("activations obfuscated", "text gamed")]
    for name in verdicts:
        if name not in known:
            raise ValueError(f"`--fail-on {name}` – expected one of {', '.join(f'`{k}`' for k in known)}.")
    return Limits(_numbers_by_name("--max", above), _numbers_by_name("--min", below), list(verdicts))


def _numbers_by_name(option: str, words: Sequence[str]) -> dict[str, float]:
    limits = {}
    for text in words:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"`{option} {text}` – expected NAME=NUMBER, such as kl=0.5.") from None
    return limits


def crossed(event: DriftEvent, verdict: Verdict, limits: Limits) -> list[str]:
    """Every limit that is crossed, in words.

    Raises:
        `ValueError`: a limit on a number that the event does not have. Such a check would always pass.
    """
    numbers: dict[str, list[tuple[str, float]]] = {}
    monitors = {name: entry.to_json() for name, entry in event.monitors.items()}
    for where, part in [("output", event.output), *event.hook_points.items(), *monitors.items()]:
        for name, value in part.items():
            if isinstance(value, int | float):
                numbers.setdefault(name, []).append((where, float(value)))
    if unknown := sorted((limits.above.keys() | limits.below.keys()) - numbers.keys()):
        raise ValueError(
            f"No number is named {', '.join(f'`{n}`' for n in unknown)} – expected some of {', '.join(sorted(numbers))}."
            + did_you_mean(unknown[0], numbers)
        )
    lines = [f"verdict `{verdict.name}`"] if verdict.name in limits.verdicts else []
    for table, sign, word in ((limits.above, 1, "above"), (limits.below, -1, "below")):
        for name, limit in table.items():
            # NaN proves nothing, so it counts as crossed.
            lines += [
                f"`{name}` at {where} is {value:.4g}, {word} {limit:g}"
                for where, value in numbers[name]
                if not sign * value <= sign * limit or math.isnan(value)
            ]
    return lines


def load_texts(path: str) -> list[Any]:
    """Texts of a file: rows of JSONL, CSV or Parquet as in `tokenize_examples`, or a text file with one text per line.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: a file without texts, or a text file that is not UTF-8.
    """
    if Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        rows: list[Any] = [{key: value for key, value in row.items() if value is not None} for row in read_rows(path)]
    elif not Path(path).exists():
        raise FileNotFoundError(f"`{path}` does not exist – expected a text file, or JSONL, CSV or Parquet.")
    else:  # only line feeds end a line; Unicode's other line separators stay inside of it
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"`{path}` is not UTF-8 ({error}) – expected a text file. Save it as UTF-8.") from None
        rows = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not rows:
        raise ValueError(f"`{path}` holds no texts – expected at least one.")
    return rows


def _tokenizer_of(before: str, after: str) -> Any:
    """The tokenizer that two checkpoints share. If only one of them has a tokenizer, it is that one.

    Raises:
        `ValueError`: they have different tokenizers, or none.
    """
    places = [[place, base] if (base := adapter_base(place)) is not None else [place] for place in (before, after)]
    sides = [next((place for place in several if has_tokenizer(place)), None) for several in places]
    tokenizer = load_tokenizer(*[place for place in sides if place is not None] or [before, after])
    if sides[0] is None or sides[1] is None:
        return tokenizer
    mine, other = tokenizer.get_vocab(), load_tokenizer(sides[1]).get_vocab()
    if mine == other:
        return tokenizer
    parts = []
    for name, extra in ((before, mine.keys() - other.keys()), (after, other.keys() - mine.keys())):
        if extra:
            shown = ", ".join(f"`{token}`" for token in sorted(extra)[:5])
            parts.append(f"only `{name}` has {len(extra)} tokens: {shown}{' …' if len(extra) > 5 else ''}")
    moved = [token for token in mine.keys() & other.keys() if mine[token] != other[token]]
    if moved:
        parts.append(f"{len(moved)} tokens have other ids, `{min(moved)}` among them")
    raise ValueError(
        f"`{before}` and `{after}` have different tokenizers – expected one, or tokens could not be compared: {'; '.join(parts)}."
    )


def _require_its_base(before: str, after: str) -> None:
    """Raise `ValueError` if B is an adapter of another base than A, or than A's own base."""
    base = adapter_base(after)
    if base is None:
        return
    other = adapter_base(before) or before
    if _same_place(base, other) or _same_files(base, other):
        return
    raise ValueError(
        f"The adapter `{after}` was trained on `{base}` – A is `{before}`"
        + (f", an adapter of `{other}`" if other != before else "")
        + ": expected one base. On another base its weights mean nothing. Name its own base as A; if the base only moved, write "
        "the new place into `adapter_config.json`."
    )


def _same_place(one: str, other: str) -> bool:
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one.rstrip("/") == other.rstrip("/")


def _same_files(one: str, other: str) -> bool:
    """True if two folders hold the same weights, by their files' digests."""
    return bool(mine := _digests(one)) and mine == _digests(other)


def _digests(folder: str) -> list[str]:
    digests = []
    for file in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests
