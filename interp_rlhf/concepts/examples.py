"""Labelled examples from a file: what a probe is fitted on and checked with.

In: a JSONL or CSV file, or a folder or Hub id that `datasets` reads. Out: examples, 0/1 labels, label names and a
fingerprint. Knows neither models nor torch.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONTENT = ("text", "messages", "prompt", "completion")


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
    def groups(self) -> list[str]:
        """Key per row of what must not be split between folds: the prompt, else the row itself."""
        return [_digest(_prompt_of(row)) for row in self.rows]

    @property
    def keys(self) -> set[str]:
        """Digest of each row's content, to find rows that two files share."""
        return {_digest({key: row[key] for key in CONTENT if key in row}) for row in self.rows}


def load_examples(source: str | Path, positive: str | None = None) -> Examples:
    """Labelled examples of a file.

    Args:
        source (`str` or `Path`): a `.jsonl` or `.csv` file, or anything that `datasets.load_dataset` or
            `load_from_disk` reads (the split `train`).
        positive (`str`, *optional*): which of two text labels means that the concept is present. Labels 0 and 1, or
            false and true, need none.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: no rows, a row without content or label, one class only, or labels that are not binary.
    """
    source = str(source)
    rows = list(read_rows(source))
    if not rows:
        raise ValueError(f"`{source}` holds no examples – expected at least two, one of each label.")
    return make_examples(rows, source=source, positive=positive)


def make_examples(
    rows: Sequence[Mapping[str, Any]], source: str = "examples", positive: str | None = None
) -> Examples:
    """Labelled examples of rows in memory; see `load_examples`."""
    unlabelled = [i for i, row in enumerate(rows) if row.get("label") is None or row.get("label") == ""]
    if unlabelled:
        raise ValueError(
            f"`{source}`: {len(unlabelled)} of {len(rows)} rows have no `label`, the first is row {unlabelled[0]} – "
            "expected one of two labels in each."
        )
    empty = [i for i, row in enumerate(rows) if not _has_content(row)]
    if empty:
        raise ValueError(
            f"`{source}`: row {empty[0]} has the keys {sorted(rows[empty[0]])} – expected `text`, `messages`, or "
            f"`prompt` and `completion` ({len(empty)} such rows)."
        )
    labels, names = _binary([row["label"] for row in rows], source, positive)
    keep = (*CONTENT, "completion_ids")
    kept = [{key: row[key] for key in keep if row.get(key) is not None} for row in rows]
    fingerprint = _digest([kept, labels.tolist()])
    return Examples(kept, labels, names, f"sha256:{fingerprint}")


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Rows as JSON lines."""
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(source: str) -> Iterable[dict[str, Any]]:
    path = Path(source)
    if path.suffix in {".jsonl", ".json", ".csv"} and not path.exists():
        raise FileNotFoundError(f"`{source}` does not exist – expected a JSONL or CSV file, or a `datasets` path.")
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    import datasets

    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(source)
    elif path.suffix == ".json":
        loaded = datasets.load_dataset("json", data_files=source)
    else:
        loaded = datasets.load_dataset(source)
    return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
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
    if positive not in distinct:
        raise ValueError(f"`positive` is `{positive}` – expected one of the labels of `{source}`: {shown}.")
    negative = next(name for name in distinct if name != positive)
    return np.array([name == positive for name in names], dtype=np.int64), (negative, positive)


def _label_name(value: Any) -> str:
    if isinstance(value, bool) or str(value).lower() in {"true", "false"}:
        return str(int(str(value).lower() == "true"))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _has_content(row: Mapping[str, Any]) -> bool:
    if row.get("text") or row.get("messages"):
        return True
    return row.get("prompt") is not None and row.get("completion") is not None


def _scored_text(row: Mapping[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    completion = row["messages"][-1:] if "messages" in row else row["completion"]
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def _prompt_of(row: Mapping[str, Any]) -> Any:
    if "messages" in row:
        return row["messages"][:-1]
    return row.get("prompt", row.get("text"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True, default=list).encode()).hexdigest()
