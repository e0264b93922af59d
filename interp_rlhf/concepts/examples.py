"""Labelled examples from a file. One set fits a probe, another set checks it.

In: a JSONL, CSV or Parquet file, or a folder or Hub id that `datasets` reads. Out: examples, 0/1 labels, label names and a
fingerprint. It must not know models, and does not import torch.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..messages import as_list, prompt_text, split_example
from .spoken import spoken

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTENT = ("text", "messages", "prompt", "completion")
# Columns that TRL renders together with the content, and the generated ids of a completion.
BESIDE = ("completion_ids", "tools", "chat_template_kwargs")
# Group of a row whose column `group` is empty, and how many groups a table may have.
NO_GROUP = "(none)"
MOST_GROUPS = 50
# Columns that hold text or messages. A file may hold messages as JSON.
SPOKEN = ("messages", "prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        rows (`list[dict]`): each with `text`, with `messages`, or with `prompt` and `completion`.
        labels (`np.ndarray` of shape (N,)): 1 if the concept is present, else 0.
        label_names (`tuple[str, str]`): names of label 0 and label 1.
        fingerprint (`str`): SHA-256 of content and labels, in order.
        slices (`tuple[str, ...]`): for tables by group: the value of each row's column `group`, such as its topic or source.
            Empty without such a column. It has nothing to do with `groups`, and does not enter the fingerprint.

    Texts, prompts and groups are computed once. Do not change the rows afterwards.
    """

    rows: list[dict[str, Any]]
    labels: np.ndarray
    label_names: tuple[str, str]
    fingerprint: str
    slices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def texts(self) -> list[str]:
        """Text of each row's completion, as text baselines see it. The probe's counted tokens have the same text."""
        return [split_example(row)[1] for row in self.rows]

    @cached_property
    def prompts(self) -> list[str]:
        """Text of each row's prompt, messages one per line. The text of a row without a prompt is empty."""
        return [prompt_text(split_example(row)[0], roles=False) for row in self.rows]

    @cached_property
    def groups(self) -> list[str]:
        """Group of each row: its prompt, or the row itself without one. Folds never split a group. Prompts that differ only in
        form, case or white space are one group."""
        return [_digest(prompt or answer) for prompt, answer in map(spoken, self.rows)]


def load_examples(source: str | Path, positive: str | None = None, group_by: str = "group") -> Examples:
    """Labelled examples of a file.

    Args:
        source (`str` or `Path`): a `.jsonl`, `.csv` or `.parquet` file, or anything that `datasets.load_dataset` or
            `load_from_disk` reads (the split `train`, or the only one).
        positive (`str`, *optional*): the text label which means that the concept is present. Not needed for the labels 0 and 1,
            or false and true.
        group_by (`str`, defaults to `"group"`): column of the tables by group, see `Examples.slices`. It need not be there.

    Returns:
        `Examples`: the rows with their labels.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: no rows, a row without content or label, one class only, or labels that are not binary.

    Example:
        >>> from interp_rlhf import load_examples
        >>> examples = load_examples("contrast.jsonl")
        >>> len(examples), int(examples.labels.sum()), examples.label_names
        (24, 12, ('0', '1'))
        >>> sorted(examples.rows[0])
        ['completion', 'prompt']
    """
    source = str(source)
    return make_examples(read_rows(source), source=source, positive=positive, group_by=group_by)


def make_examples(
    rows: Iterable[Mapping[str, Any]], source: str = "examples", positive: str | None = None, group_by: str = "group"
) -> Examples:
    """Labelled examples of rows in memory, such as a list, a `Dataset` or a `DataFrame`. See `load_examples`."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        keys = f" with the keys {', '.join(f'`{key}`' for key in rows)}" if isinstance(rows, Mapping) else ""
        raise ValueError(
            f"`{source}` is a {type(rows).__name__}{keys} – expected rows, each with a `label`. Pass one split of a "
            "`DatasetDict`."
        )
    rows = as_list(rows)
    if not rows:
        raise ValueError(f"`{source}` holds no examples – expected at least two, one of each label.")
    if strange := [i for i, row in enumerate(rows) if not isinstance(row, Mapping)]:
        raise ValueError(
            f"`{source}`: row {strange[0]} is a {type(rows[strange[0]]).__name__} – expected a mapping with `label`."
        )
    labels = [_python_label(row.get("label")) for row in rows]
    unlabelled = [i for i, label in enumerate(labels) if label is None or label == "" or label != label]
    if unlabelled:
        raise ValueError(
            f"`{source}`: {len(unlabelled)} of {len(rows)} rows have no `label`, the first is row {unlabelled[0]} – "
            "expected one of two labels in each. Label them or remove them."
        )
    for i, row in enumerate(rows):
        filled = {
            key: value
            for key, value in row.items()
            if key not in ("text", "messages") or not isinstance(value, str) or value
        }
        split_example(filled, f"`{source}`: row {i}")
    binary, names = _binary(labels, source, positive)
    keep = (*CONTENT, *BESIDE)
    kept = [
        {
            key: row[key]
            for key in keep
            if row.get(key) is not None and (key not in ("text", "messages") or row[key] != "")
        }
        for row in rows
    ]
    fingerprint = _digest([kept, binary.tolist()])
    return Examples(kept, binary, names, f"sha256:{fingerprint}", _slices(rows, source, group_by))


def _slices(rows: Sequence[Mapping[str, Any]], source: str, column: str) -> tuple[str, ...]:
    """The group of each row; none without the column. A row without a value is in the group `NO_GROUP`.

    Raises:
        `ValueError`: a column was asked for that is not there, or it has one value or more than `MOST_GROUPS`.
    """
    if not any(column in row for row in rows):
        if column == "group":
            return ()
        known = sorted({key for row in rows for key in row})
        raise ValueError(
            f"`{source}` has no column `{column}` – expected one of {', '.join(f'`{key}`' for key in known)}."
        )
    values = [_python_label(row.get(column)) for row in rows]
    slices = tuple(NO_GROUP if value in (None, "") or value != value else str(value) for value in values)
    count = len(set(slices))
    if count < 2 or count > MOST_GROUPS:
        raise ValueError(
            f"`{source}`: the column `{column}` has {count} values in {len(rows)} rows – expected 2 to {MOST_GROUPS} groups. Use "
            "a coarser column (`group_by`, `--group-by`), or remove it."
        )
    return slices


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Rows as JSON lines."""
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """Rows of a file or a data set: JSONL, JSON, CSV (also Excel's), Parquet, or anything that `datasets` reads.

    Messages in a text column are read as JSON.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: a file of another form. The message names the line.
    """
    return [{key: _parsed_messages(str(source), key, value) for key, value in row.items()} for row in _rows_of(source)]


def read_prompts(source: str | Path) -> list[Any]:
    """The column `prompt` of a file or a data set. See `read_rows`.

    Raises:
        `ValueError`: no rows, or a row without a prompt.
    """
    rows = read_rows(source)
    without = [i for i, row in enumerate(rows) if not row.get("prompt")]
    if without or not rows:
        raise ValueError(
            f"`{source}` has {len(rows)} rows, {len(without)} of them without a `prompt` – expected one in each. Add prompts, or "
            "remove these rows."
        )
    return [row["prompt"] for row in rows]


def _rows_of(source: str | Path) -> list[dict[str, Any]]:
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in {".jsonl", ".json", ".csv", ".tsv", ".parquet"} and not path.exists():
        raise FileNotFoundError(
            f"`{source}` does not exist – expected a JSONL, CSV or Parquet file, or a `datasets` path."
        )
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    import datasets

    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(source))
        elif suffix == ".json":
            loaded = datasets.load_dataset("json", data_files=str(source))
        else:
            loaded = datasets.load_dataset(str(source))
    except StopIteration:  # an empty file
        return []
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`{source}` is not a JSONL, CSV or Parquet file, and `datasets` cannot read it ({error}) – expected a file or a "
            "data set. Check the path."
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        splits = sorted(loaded)
        if "train" not in splits and len(splits) != 1:
            raise ValueError(
                f"`{source}` has the splits {', '.join(f'`{split}`' for split in splits)} – expected `train`, or one split "
                "only. Save the split that you mean as its own data set."
            )
        loaded = loaded["train" if "train" in splits else splits[0]]
    return [dict(row) for row in loaded]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"`{path}` is not a whole Parquet file ({error}) – expected one. Copy it again.") from None
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, as Excel writes them too: with commas, semicolons or tabs, in UTF-8 or UTF-16, with or without a
    byte-order mark. Cells with messages are read as JSON."""
    csv.field_size_limit(2**31 - 1)
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is not {encoding.removesuffix('-sig').upper()} ({error}) – expected UTF-8. Save it as UTF-8."
        ) from None
    known = {*CONTENT, *BESIDE, "label"}
    head = text.split("\n", 1)[0]
    marks = [",", ";", "\t"]
    mark = max(
        marks, key=lambda m: (len(known & {name.strip().strip('"') for name in head.split(m)}), -marks.index(m))
    )
    rows = []
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True), 2):
            if None in row:
                raise ValueError(
                    f"`{path}`: row {number} has more cells than the header names – expected {len(row) - 1}. Put cells that "
                    f"contain `{mark}` in quotes."
                )
            rows.append({str(key).strip(): _parsed_cell(str(key).strip(), value) for key, value in row.items()})
    except csv.Error as error:
        raise ValueError(
            f"`{path}` is not a CSV file ({error}) – expected one with a header. Save it again."
        ) from None
    return rows


def _parsed_cell(name: str, value: str | None) -> Any:
    """A cell. Messages, tools and ids are read as JSON."""
    if value is None or value == "":
        return None
    if name in ("messages", *BESIDE):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(
                f"A cell of the column `{name}` is not JSON: {value[:60]!r} – expected a list, such as "
                '[{"role": "user", "content": "…"}], in double quotes.'
            ) from None
    return value


def _parsed_messages(source: str, name: str, value: Any) -> Any:
    """A value of a row. A text that holds messages as JSON becomes these messages.

    Raises:
        `ValueError`: a text holds messages in another form, such as the `str` of a Python list.
    """
    if name not in SPOKEN or not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    if not re.search(r"""["']role["']\s*:""", value):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        if not re.match(r"""\s*(\[\s*)?\{\s*["']""", value) or not re.search(r"""["']content["']\s*:""", value):
            return value  # a text that only looks like messages at its start
        raise ValueError(
            f"`{source}`: the column `{name}` holds messages that are not JSON: {value[:60]!r} – expected messages such as "
            '[{"role": "user", "content": "…"}], in double quotes. Write them with `json.dumps`.'
        ) from None
    if isinstance(parsed, dict) and "role" in parsed and "content" in parsed:
        return [parsed]
    messages = isinstance(parsed, list) and all(isinstance(item, dict) and "role" in item for item in parsed)
    return parsed if messages else value


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8 ({error}) – expected JSON lines. Save it as UTF-8.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"`{path}`, line {number}: {error} – expected one JSON object per line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"`{path}`, line {number} is a {type(row).__name__} – expected a JSON object.")
        rows.append(row)
    return rows


def _binary(values: Sequence[Any], source: str, positive: str | None) -> tuple[np.ndarray, tuple[str, str]]:
    names = [_label_name(value) for value in values]
    distinct = sorted(set(names))
    shown = ", ".join(f"`{name}`" for name in distinct[:6]) + (" …" if len(distinct) > 6 else "")
    if len(distinct) == 1:
        raise ValueError(
            f"`{source}` has one label only, {shown}, in {len(values)} rows – expected two classes. Add examples of the other."
        )
    if len(distinct) > 2:
        raise ValueError(
            f"`{source}` has {len(distinct)} labels: {shown} – expected two (0 and 1, false and true, or two names). Keep "
            "two of them."
        )
    if positive is None:
        if distinct != ["0", "1"]:
            raise ValueError(
                f"`{source}` has the labels {shown} – expected 0 and 1, or `positive` (`--positive`) to say which of the "
                "two means that the concept is present."
            )
        positive = "1"
    positive = _label_name(positive)
    if positive not in distinct:
        raise ValueError(f"`positive` is `{positive}` – expected one of the labels of `{source}`: {shown}.")
    negative = next(name for name in distinct if name != positive)
    return np.array([name == positive for name in names], dtype=np.int64), (negative, positive)


def _label_name(value: Any) -> str:
    if isinstance(value, bool) or str(value).lower() in {"true", "false"}:
        return str(int(str(value).lower() == "true"))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return re.sub(r"^([01])\.0+$", r"\1", str(value))


def _python_label(label: Any) -> Any:
    """A label as a plain Python value, if it is a scalar of numpy or torch."""
    return label.item() if hasattr(label, "item") and getattr(label, "ndim", 1) == 0 else label


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True, default=list).encode()).hexdigest()
