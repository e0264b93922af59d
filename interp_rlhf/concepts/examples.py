"""Labelled examples from a file: what a probe is fitted on and checked with.

In: a JSONL, CSV or Parquet file, or a folder or Hub id that `datasets` reads. Out: examples, 0/1 labels, label names and a
fingerprint. Knows neither models nor torch.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..messages import as_list, content_text, split_example
from .spoken import spoken

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTENT = ("text", "messages", "prompt", "completion")
# Columns that TRL renders along with them, or that hold a completion as it was generated.
BESIDE = ("completion_ids", "tools", "chat_template_kwargs")
# Columns that hold text or messages; a file may hold the latter as JSON.
SPOKEN = ("messages", "prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        rows (`list[dict]`): each with `text`, with `messages`, or with `prompt` and `completion`.
        labels (`np.ndarray` of shape (N,)): 1 where the concept is present.
        label_names (`tuple[str, str]`): names of label 0 and label 1.
        fingerprint (`str`): SHA-256 of content and labels, in order.
    """

    rows: list[dict[str, Any]]
    labels: np.ndarray
    label_names: tuple[str, str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """What a text baseline sees: the text that the probe's counted tokens spell."""
        return [_scored_text(row) for row in self.rows]

    @property
    def prompts(self) -> list[str]:
        """Text of each row's prompt, messages one per line; empty where there is none."""
        return [_prompt_text(split_example(row)[0]) for row in self.rows]

    @property
    def groups(self) -> list[str]:
        """Key per row of what must not be split between folds: the prompt, else the row itself, whatever its form, case and
        white space."""
        return [_digest(prompt or answer) for prompt, answer in map(spoken, self.rows)]


def load_examples(source: str | Path, positive: str | None = None) -> Examples:
    """Labelled examples of a file.

    Args:
        source (`str` or `Path`): a `.jsonl`, `.csv` or `.parquet` file, or anything that `datasets.load_dataset` or
            `load_from_disk` reads (the split `train`, or the only one).
        positive (`str`, *optional*): which of two text labels means that the concept is present. Labels 0 and 1, or
            false and true, need none.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: no rows, a row without content or label, one class only, or labels that are not binary.
    """
    source = str(source)
    return make_examples(read_rows(source), source=source, positive=positive)


def make_examples(
    rows: Iterable[Mapping[str, Any]], source: str = "examples", positive: str | None = None
) -> Examples:
    """Labelled examples of rows in memory, such as a list, a `Dataset` or a `DataFrame`; see `load_examples`."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        keys = f" with the keys {', '.join(f'`{key}`' for key in rows)}" if isinstance(rows, Mapping) else ""
        raise ValueError(
            f"`{source}` is a {type(rows).__name__}{keys} – expected rows, each with a `label`. Of a `DatasetDict`, "
            "pass one split."
        )
    rows = as_list(rows)
    if not rows:
        raise ValueError(f"`{source}` holds no examples – expected at least two, one of each label.")
    if strange := [i for i, row in enumerate(rows) if not isinstance(row, Mapping)]:
        raise ValueError(
            f"`{source}`: row {strange[0]} is a {type(rows[strange[0]]).__name__} – expected a mapping with `label`."
        )
    labels = [_plain(row.get("label")) for row in rows]
    unlabelled = [i for i, label in enumerate(labels) if label is None or label == "" or label != label]
    if unlabelled:
        raise ValueError(
            f"`{source}`: {len(unlabelled)} of {len(rows)} rows have no `label`, the first is row {unlabelled[0]} – "
            "expected one of two labels in each."
        )
    for i, row in enumerate(rows):
        filled = {
            key: value
            for key, value in row.items()
            if key not in ("text", "messages") or not isinstance(value, str) or value
        }
        split_example(filled, f"`{source}`: row {i}")
    found, names = _binary(labels, source, positive)
    keep = (*CONTENT, *BESIDE)
    kept = [
        {
            key: row[key]
            for key in keep
            if row.get(key) is not None and (key not in ("text", "messages") or row[key] != "")
        }
        for row in rows
    ]
    fingerprint = _digest([kept, found.tolist()])
    return Examples(kept, found, names, f"sha256:{fingerprint}")


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Rows as JSON lines."""
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """Rows of a file or a data set: JSONL, JSON, CSV (also Excel's), Parquet, or what `datasets` reads.

    Messages that stand in a text column as JSON are read.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: a file of another form; the message says which line.
    """
    return [{key: _spoken(str(source), key, value) for key, value in row.items()} for row in _rows(source)]


def read_prompts(source: str | Path) -> list[Any]:
    """The column `prompt` of a file or a data set; see `read_rows`.

    Raises:
        `ValueError`: no rows, or one without a prompt.
    """
    rows = read_rows(source)
    without = [i for i, row in enumerate(rows) if not row.get("prompt")]
    if without or not rows:
        raise ValueError(
            f"`{source}` has {len(rows)} rows, {len(without)} of them without a `prompt` – expected one in each."
        )
    return [row["prompt"] for row in rows]


def _rows(source: str | Path) -> list[dict[str, Any]]:
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
    except StopIteration:  # a file without a byte
        return []
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"`{source}` is no JSONL, CSV or Parquet file, and `datasets` does not read it ({error}) – expected one of the two."
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        splits = sorted(loaded)
        if "train" not in splits and len(splits) != 1:
            raise ValueError(
                f"`{source}` has the splits {', '.join(f'`{split}`' for split in splits)} – expected `train`, or one split "
                "only. Save the one that is meant by itself."
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
    """Rows of a CSV file: with commas, semicolons or tabs, in UTF-8 or UTF-16, with a byte-order mark or without, as Excel writes
    them; cells that hold messages as JSON are read."""
    csv.field_size_limit(2**31 - 1)
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is not {encoding.removesuffix('-sig').upper()} ({error}) – expected UTF-8. Save it so."
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
                    f"`{path}`: row {number} has more cells than the header names – expected {len(row) - 1}. Put cells that hold "
                    f"`{mark}` in quotes."
                )
            rows.append({str(key).strip(): _cell(str(key).strip(), value) for key, value in row.items()})
    except csv.Error as error:
        raise ValueError(f"`{path}` is not a CSV file ({error}) – expected one, with a header.") from None
    return rows


def _cell(name: str, value: str | None) -> Any:
    """A cell, read as JSON where it holds messages, tools or ids."""
    if value is None or value == "":
        return None
    if name in ("messages", *BESIDE):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(
                f"A cell of the column `{name}` is no JSON: {value[:60]!r} – expected a list, such as "
                '[{"role": "user", "content": "…"}], in double quotes.'
            ) from None
    return value


def _spoken(source: str, name: str, value: Any) -> Any:
    """A value of a row, messages where it is a text that holds them as JSON.

    Raises:
        `ValueError`: it holds them in another form, as `str` writes a list in Python.
    """
    if name not in SPOKEN or not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    if not re.search(r"""["']role["']\s*:""", value):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        if not re.match(r"""\s*(\[\s*)?\{\s*["']""", value) or not re.search(r"""["']content["']\s*:""", value):
            return value  # a text that begins so
        raise ValueError(
            f"`{source}`: the column `{name}` holds messages that are no JSON: {value[:60]!r} – expected such as "
            '[{"role": "user", "content": "…"}], in double quotes. Write them with `json.dumps`.'
        ) from None
    if isinstance(found, dict) and "role" in found and "content" in found:
        return [found]
    messages = isinstance(found, list) and all(isinstance(item, dict) and "role" in item for item in found)
    return found if messages else value


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
        raise ValueError(f"`{source}` has one label only, {shown}, in {len(values)} rows – expected two classes.")
    if len(distinct) > 2:
        raise ValueError(
            f"`{source}` has {len(distinct)} labels: {shown} – expected two (0 and 1, false and true, or two names)."
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


def _plain(label: Any) -> Any:
    """A label of numpy or torch as Python's own."""
    return label.item() if hasattr(label, "item") and getattr(label, "ndim", 1) == 0 else label


def _scored_text(row: Mapping[str, Any]) -> str:
    return split_example(row)[1]


def _prompt_text(prompt: Any) -> str:
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    return "\n".join(content_text(message.get("content")) for message in prompt)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True, default=list).encode()).hexdigest()
