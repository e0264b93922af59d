"""The battery offline: two checkpoints instead of a run and its start.

In: two models (a base and a tuned one, or an adapter and its base). Out: a `drift` event and its verdict, and which limits it
crosses.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..activations.batch import tokenize_examples
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import decoder_layers, has_adapters, layers_or_none, resolve
from ..activations.loading import adapter_base, has_tokenizer, load_model, load_tokenizer
from ..activations.noise import require_positions
from ..concepts.card import load_card
from ..concepts.examples import read_rows
from ..concepts.readout import Readout
from ..messages import as_list
from .battery import Battery, spread
from .monitors import LabelledSet
from .texts import TEXTS
from .verdicts import TABLE, gather, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.examples import Examples
    from .battery import Snapshot
    from .monitors import Reading
    from .verdicts import Verdict


def compare_checkpoints(
    before: str,
    after: str,
    *,
    texts: Sequence[Any] | None = None,
    hook_points: Sequence[str] | None = None,
    monitors: Sequence[str] = (),
    labelled: Examples | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[dict[str, Any], Verdict]:
    """Loads one model after the other, so that only one is in memory.

    Args:
        before (`str`), after (`str`): folders or Hub ids; either may be a folder with a PEFT adapter; that of
            `after` is one of `before`, or of its base.
        texts, hook_points, labelled, seed: as in `DriftConfig`.
        monitors (`Sequence[str]`): cards.

    Returns:
        The `drift` event and its verdict. Intervals are bootstraps over the labelled examples.

    Raises:
        `ValueError`: models that cannot be compared: another tokenizer, vocabulary, width or base; a model without a
            language-model head; monitors of another model.
    """
    readouts = [Readout.from_card(load_card(path)) for path in as_list(monitors)]
    if readouts and labelled is None:
        raise ValueError(
            f"{len(readouts)} monitors and no `labelled` examples – expected some (`--labelled`) to read them on."
        )
    _require_its_base(before, after)
    tokenizer = _tokenizer_of(before, after)
    found: list[tuple[Snapshot, dict[str, Reading]]] = []
    battery: Battery | None = None
    examples: LabelledSet | None = None
    with tqdm(total=2, desc="Models", disable=not progress, leave=False) as bar:
        for side in (before, after):
            model = load_model(side, before if side == after and adapter_base(before) is None else None)
            if battery is None:
                layers = layers_or_none(model) if hook_points else decoder_layers(model)
                points = list(
                    dict.fromkeys([*(as_list(hook_points) or spread(layers)), *(r.hook_point for r in readouts)])
                )
                for readout in readouts:  # below A's adapters, where it has some
                    readout.check_model(model, exact=not has_adapters(model))
                points.sort(key=lambda point: layers.index(point) if point in layers else -1)
                ends = end_of_turn_ids(model, tokenizer)
                rows = list(TEXTS if texts is None else as_list(texts))
                battery = Battery(tokenize_examples(rows, tokenizer, end_of_turn_ids=ends), points)
                if labelled is not None:
                    batch = tokenize_examples(labelled.rows, tokenizer, end_of_turn_ids=ends)
                    examples = LabelledSet(labelled, batch, seed)
            for point in battery.hook_points:
                resolve(model, point)
            for readout in readouts:
                readout.check_model(model, exact=False, trained=True)
            require_positions(model, battery.batch)
            old = found[0][1] if found else None
            found.append((battery.read(model), examples.read(model, readouts, old) if examples and readouts else {}))
            del model
            bar.update()
    assert battery is not None
    (first, first_readings), (second, second_readings) = found
    width = {
        side: snapshot.activations[battery.hook_points[0]].shape[1]
        for side, snapshot in ((before, first), (after, second))
    }
    if len(set(width.values())) > 1:
        raise ValueError(f"The models have widths {width} – expected one: activations could not be compared.")
    words = {side: snapshot.predictions.shape[1] for side, snapshot in ((before, first), (after, second))}
    if len(set(words.values())) > 1:
        raise ValueError(
            f"The models predict over {words} tokens – expected one vocabulary: predictions could not be compared. Resize the "
            "embedding of one as that of the other was."
        )
    points_found, output = battery.compare(first, second)
    event: dict[str, Any] = {
        "before": before, "after": after, "texts": len(battery), "tokens": battery.tokens, "hook_points": points_found,
        "output": output, "monitors": {},
    }  # fmt: skip
    for readout in readouts:
        assert examples is not None
        summary = examples.summary(second_readings[readout.name], first_readings[readout.name])
        event["monitors"][readout.name] = {**summary, "hook_point": readout.hook_point}
    return event, judge(gather(event))


@dataclass(frozen=True)
class Limits:
    """What must not be crossed."""

    above: dict[str, float]
    below: dict[str, float]
    verdicts: list[str]


def parse_limits(above: Sequence[str], below: Sequence[str], verdicts: Sequence[str]) -> Limits:
    """Limits as they are written on the command line, `kl=0.5`.

    Raises:
        `ValueError`: not `name=number`, or no verdict that two checkpoints can get.
    """
    # The others need a training: something that pushes, rewards, samples.
    known = [rule.name for rule in TABLE if rule.name not in ("activations obfuscated", "text gamed")]
    for name in verdicts:
        if name not in known:
            raise ValueError(f"`--fail-on {name}` – expected one of {', '.join(f'`{k}`' for k in known)}.")
    return Limits(_limits("--max", above), _limits("--min", below), list(verdicts))


def _limits(option: str, given: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"`{option} {text}` – expected NAME=NUMBER, such as kl=0.5.") from None
    return found


def crossed(event: dict[str, Any], verdict: Verdict, limits: Limits) -> list[str]:
    """Every limit that is crossed, in words.

    Raises:
        `ValueError`: a limit on a number that there is not: a check that silently passes is none.
    """
    numbers: dict[str, list[tuple[str, float]]] = {}
    parts = [("output", event["output"]), *event["hook_points"].items(), *event["monitors"].items()]
    for where, part in parts:
        for name, value in part.items():
            if isinstance(value, int | float):
                numbers.setdefault(name, []).append((where, float(value)))
    if unknown := sorted((limits.above.keys() | limits.below.keys()) - numbers.keys()):
        raise ValueError(
            f"No number is named {', '.join(f'`{n}`' for n in unknown)} – expected some of {', '.join(sorted(numbers))}."
        )
    found = [f"verdict `{verdict.name}`"] if verdict.name in limits.verdicts else []
    for table, sign, word in ((limits.above, 1, "above"), (limits.below, -1, "below")):
        for name, limit in table.items():
            # Not a number is no proof of anything, so it counts as crossed.
            found += [
                f"`{name}` at {where} is {value:.4g}, {word} {limit:g}"
                for where, value in numbers[name]
                if not sign * value <= sign * limit or math.isnan(value)
            ]
    return found


def load_texts(path: str) -> list[Any]:
    """Texts of a file: rows of JSONL, CSV or Parquet as in `tokenize_examples`, or a text file with one text per line."""
    if Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        rows: list[Any] = [{key: value for key, value in row.items() if value is not None} for row in read_rows(path)]
    elif not Path(path).exists():
        raise FileNotFoundError(f"`{path}` does not exist – expected a text file, or JSONL, CSV or Parquet.")
    else:  # other marks that Unicode calls line ends stand inside of a line
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"`{path}` is not UTF-8 ({error}) – expected a text file. Save it as UTF-8.") from None
        rows = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not rows:
        raise ValueError(f"`{path}` holds no texts – expected at least one.")
    return rows


def _tokenizer_of(before: str, after: str) -> Any:
    """The one tokenizer of two checkpoints; of one that has none, the other's.

    Raises:
        `ValueError`: they have two, or none.
    """
    places = [[place, base] if (base := adapter_base(place)) is not None else [place] for place in (before, after)]
    sides = [next((place for place in own if has_tokenizer(place)), None) for own in places]
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
    """Raises `ValueError` where B is an adapter of another base than A, or than A's own base."""
    base = adapter_base(after)
    if base is None:
        return
    other = adapter_base(before) or before
    if _same_place(base, other) or _same_files(base, other):
        return
    raise ValueError(
        f"The adapter `{after}` was trained on `{base}` – A is `{before}`"
        + (f", an adapter of `{other}`" if other != before else "")
        + ": expected one base. On another one its weights mean nothing. Name its own base as A; if that was only moved, write "
        "the new place into its `adapter_config.json`."
    )


def _same_place(one: str, other: str) -> bool:
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one.rstrip("/") == other.rstrip("/")


def _same_files(one: str, other: str) -> bool:
    """Whether two folders hold the same weights, by their files' digests."""
    return bool(mine := _digests(one)) and mine == _digests(other)


def _digests(folder: str) -> list[str]:
    found = []
    for file in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
        with file.open("rb") as opened:
            found.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return found
