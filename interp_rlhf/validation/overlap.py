"""Rows of held-out examples that the fit has already seen, in any form, and near-duplicates.

In: the fit's examples and held-out ones. Out: row numbers. A conversation is the same row as messages, as prompt and
completion, as plain text or rendered by a chat template; rows that differ only in case or white space are the same.
It must not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..concepts.spoken import spoken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.examples import Examples
    from ..concepts.spoken import Spoken

# An answer identifies its row without the prompt only if it has this many characters: "Yes." answers many prompts.
TELLING = 20
# Near-duplicates: Jaccard similarity of the sets of all pieces of five characters.
SHINGLE = 5
SIMILAR = 0.8
FEWEST_SHINGLES = 10
FEWEST_OF_AN_ANSWER = 40
# A shingle in more rows than both of these is part of a template or of a common prompt, and is left out.
COMMON_SHARE, COMMON_ROWS = 0.1, 5
SHINGLE_COLUMNS = 2**22
COMPARED_ROWS = 256


@dataclass(frozen=True)
class Overlap:
    """Rows that held-out examples share with the examples of a fit.

    Attributes:
        rows (`list[int]`): held-out rows that the fit has seen.
        prompts (`list[int]`): held-out rows whose prompt is a prompt of the fit.
        near (`list[tuple[int, int, float]]`): held-out row, the most similar row of the fit, and their similarity in
            [0.8, 1]. The rows in `rows` and `prompts` are left out.
    """

    rows: list[int]
    prompts: list[int]
    near: list[tuple[int, int, float]]


def overlap(fit: Examples, held_out: Examples, what: str = "held-out examples") -> Overlap:
    """Held-out rows that the fit has seen, rows whose prompt it has seen, and near-duplicates of its rows.

    A row is seen if its prompt and answer together are the same text as a row of the fit. If one of the two has no prompt,
    the answer alone is enough, provided that it has at least 20 characters. The same answer to another prompt is another row.

    Near-duplicates have a Jaccard similarity of at least 0.8, of prompt and answer or of long answers alone. Shingles that
    many rows share do not count, so a template, a system prompt or few-shot examples do not make rows near-duplicates.

    Args:
        what (`str`): name of the held-out examples in an error.
    """
    fit_rows, rows = _spoken_rows(fit, "fit's examples"), _spoken_rows(held_out, what)
    seen, prompts = _shared(fit_rows, rows)
    return Overlap(seen, prompts, _near(fit_rows, rows, {*seen, *prompts}))


def require_apart(fit: Examples, held_out: Examples, what: str = "held-out examples") -> list[tuple[int, int, float]]:
    """Near-duplicates (see `Overlap.near`) of two sets of examples that share neither a row nor a prompt.

    Raises:
        `ValueError`: they share a row or a prompt.
    """
    shared = overlap(fit, held_out, what)
    if shared.rows or shared.prompts:
        counts = [f"{len(shared.rows)} rows"] * bool(shared.rows)
        if shared.prompts:
            counts.append(f"{len({spoken(held_out.rows[i])[0] for i in shared.prompts})} prompts")
        first = (shared.rows or shared.prompts)[0]
        text = _joined(spoken(held_out.rows[first]))
        text = text if len(text) <= 60 else text[:59] + "…"
        why = "" if shared.rows else ": answers to one prompt are alike, and the probe may know the prompt"
        raise ValueError(
            f"{' and '.join(counts)} of the {what} are among the fit's, the first is row {first}, {text!r} – expected data "
            f"that the fit did not see{why}. Case, white space and form (text, messages, prompt and completion) make no other "
            "row. Remove them."
        )
    return shared.near


def _spoken_rows(examples: Examples, what: str) -> list[Spoken]:
    texts = []
    for i, row in enumerate(examples.rows):
        try:
            texts.append(spoken(row))
        except ValueError as error:
            raise ValueError(f"Row {i} of the {what}: {error}") from None
    return texts


def _joined(row: Spoken) -> str:
    return " ".join(row).strip()


def _shared(fit: Sequence[Spoken], rows: Sequence[Spoken]) -> tuple[list[int], list[int]]:
    """Numbers of the rows that are also rows of the fit, and of the rows whose prompt is also a prompt of the fit."""
    wholes = {_joined(row) for row in fit}
    prompts = {prompt for prompt, _ in fit if prompt}
    # A plain text can be another row's answer, or its prompt and answer without a space between them, as in Chinese.
    texts = {answer for prompt, answer in fit if not prompt}
    parts = {part for prompt, answer in fit if prompt for part in (answer, prompt + answer)}

    def is_seen(prompt: str, answer: str) -> bool:
        if _joined((prompt, answer)) in wholes:
            return True
        if not prompt:
            return len(answer) >= TELLING and answer in parts
        return any(len(part) >= TELLING and part in texts for part in (answer, prompt + answer))

    seen = [i for i, row in enumerate(rows) if is_seen(*row)]
    return seen, [i for i, (prompt, _) in enumerate(rows) if prompt in prompts]


def _near(fit: Sequence[Spoken], rows: Sequence[Spoken], skip: set[int]) -> list[tuple[int, int, float]]:
    """The most similar row of the fit for each row not in `skip`, if it is similar enough. Of equals, the first."""
    best: dict[int, tuple[float, int]] = {}
    wanted = np.array([i for i in range(len(rows)) if i not in skip], dtype=np.int64)
    views = [(FEWEST_SHINGLES, [_joined(row) for row in (*fit, *rows)])]
    if any(prompt for prompt, _ in (*fit, *rows)):
        views.append((FEWEST_OF_AN_ANSWER, [answer for _, answer in (*fit, *rows)]))
    for fewest, texts in views:
        for row, other, similarity in _pairs(texts, len(fit), wanted, fewest):
            best[row] = max(best.get(row, (0.0, 0)), (similarity, -other))
    return [(row, -other, round(similarity, 4)) for row, (similarity, other) in sorted(best.items())]


def _pairs(texts: Sequence[str], split: int, wanted: np.ndarray, fewest: int) -> list[tuple[int, int, float]]:
    """Best match in `texts[:split]` for each wanted text of `texts[split:]`: row, other row, Jaccard similarity.

    The result is exact, without a comparison of all pairs (prefix filtering; Bayardo, Ma and Srikant 2007). Sets with a
    similarity of at least t share one of the n − ⌈tn⌉ + 1 rarest of the n members of either. Only such pairs are compared.
    """
    shingles = _shingles(texts)
    sizes = np.diff(shingles.indptr)
    prefix = shingles.copy()
    place = np.arange(prefix.nnz) - np.repeat(prefix.indptr[:-1], sizes)
    longest = np.where(sizes >= fewest, sizes - np.ceil(SIMILAR * sizes - 1e-9) + 1, 0)
    prefix.data = (place < np.repeat(longest, sizes)).astype(np.int32)
    prefix.eliminate_zeros()
    fit, others = shingles[:split], prefix[:split].T.tocsr()
    member = np.zeros(shingles.shape[1], dtype=np.int32)
    matches = []
    for start in range(0, len(wanted), COMPARED_ROWS):
        chunk: np.ndarray = split + wanted[start : start + COMPARED_ROWS]
        shared = prefix[chunk] @ others
        for i, row in enumerate(chunk.tolist()):
            candidates = np.sort(shared.indices[shared.indptr[i] : shared.indptr[i + 1]])
            small, large = np.minimum(sizes[candidates], sizes[row]), np.maximum(sizes[candidates], sizes[row])
            candidates = candidates[small >= SIMILAR * large]
            if not candidates.size:
                continue
            row_shingles = shingles.indices[shingles.indptr[row] : shingles.indptr[row + 1]]
            member[row_shingles] = 1
            both = fit[candidates] @ member
            member[row_shingles] = 0
            similarity = both / (sizes[candidates] + sizes[row] - both)
            k = int(similarity.argmax())
            if similarity[k] >= SIMILAR:
                matches.append((row - split, int(candidates[k]), float(similarity[k])))
    return matches


def _shingles(texts: Sequence[str]) -> Any:
    """Hashed shingles of each text as a sparse matrix of ones (N, columns), the rarest columns first and without common ones."""
    from scipy.sparse import csr_array

    rows = [_hashed(text) for text in texts]
    columns = np.concatenate(rows)
    counts = np.bincount(columns, minlength=SHINGLE_COLUMNS)
    rank: np.ndarray = np.empty(SHINGLE_COLUMNS, dtype=np.int32)
    used = counts.nonzero()[0]
    rank[used[counts[used].argsort(kind="stable")]] = np.arange(used.size, dtype=np.int32)
    kept = counts[columns] <= max(COMMON_ROWS, COMMON_SHARE * len(texts))
    owner = np.repeat(np.arange(len(rows)), [row.size for row in rows])[kept]
    ends = np.concatenate([[0], np.bincount(owner, minlength=len(rows)).cumsum()])
    indices = rank[columns[kept]]
    matrix = csr_array((np.ones(indices.size, dtype=np.int32), indices, ends), shape=(len(rows), max(used.size, 1)))
    matrix.sort_indices()
    return matrix


def _hashed(text: str) -> np.ndarray:
    """Columns of the shingles of a text, each once."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = max(letters.size - SHINGLE + 1, 0)
    value = np.zeros(count, dtype=np.uint64)
    for k in range(SHINGLE):
        value = value * np.uint64(0x9E3779B97F4A7C15) + letters[k : k + count]
    value = (value ^ (value >> np.uint64(29))) * np.uint64(
        0xBF58476D1CE4E5B9
    )  # mixed, so that the highest bits depend on all
    return np.unique((value >> np.uint64(42)).astype(np.int32))
