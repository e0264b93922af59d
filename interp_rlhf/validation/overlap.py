"""Rows of held-out examples that the fit has already seen, in any form, and near-duplicates.

In: the fit's examples and held-out ones. Out: row numbers. A conversation is the same row as messages, as prompt and
completion, as plain text or rendered by a chat template; case and white space never tell two rows apart. It must not know models.
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

# Characters that an answer needs to stand for its row without the prompt: "Yes." answers many prompts.
TELLING = 20
# Near-duplicates: Jaccard similarity of the sets of all pieces of five characters.
SHINGLE = 5
SIMILAR = 0.8
FEWEST_SHINGLES = 10
FEWEST_OF_AN_ANSWER = 40
# A shingle in more rows than both of these is part of a template or of a common prompt: it is left out.
COMMON_SHARE, COMMON_ROWS = 0.1, 5
SHINGLE_COLUMNS = 2**22
COMPARED_ROWS = 256


@dataclass(frozen=True)
class Overlap:
    """What held-out examples share with a fit's.

    Attributes:
        rows (`list[int]`): held-out rows that the fit has seen.
        prompts (`list[int]`): held-out rows whose prompt is a prompt of the fit.
        near (`list[tuple[int, int, float]]`): held-out row, the fit's row that is most like it, and their similarity in
            [0.8, 1]. Without the rows in `rows` and `prompts`.
    """

    rows: list[int]
    prompts: list[int]
    near: list[tuple[int, int, float]]


def overlap(fit: Examples, held_out: Examples, what: str = "held-out examples") -> Overlap:
    """Held-out rows that the fit has seen, those whose prompt it has seen, and those that are nearly one of its rows.

    A row is seen if its prompt and answer together are the same text as a row of the fit. Where one of the two has no prompt,
    the answer alone is enough if it has at least 20 characters. The same answer to another prompt is another row.

    Near-duplicates have a Jaccard similarity of at least 0.8, of prompt and answer or of long answers alone. Shingles that
    many rows share do not count, so a template, a system prompt or few-shot examples make no near-duplicates.

    Args:
        what (`str`): what an error calls the held-out examples.
    """
    fit_rows, rows = _spoken_rows(fit, "fit's examples"), _spoken_rows(held_out, what)
    seen, prompts = _shared(fit_rows, rows)
    return Overlap(seen, prompts, _near(fit_rows, rows, {*seen, *prompts}))


def require_apart(fit: Examples, held_out: Examples, what: str = "held-out examples") -> list[tuple[int, int, float]]:
    """Near-duplicates (see `Overlap.near`) of two sets of examples that share neither a row nor a prompt.

    Raises:
        `ValueError`: they share one.
    """
    found = overlap(fit, held_out, what)
    if found.rows or found.prompts:
        counts = [f"{len(found.rows)} rows"] * bool(found.rows)
        if found.prompts:
            counts.append(f"{len({spoken(held_out.rows[i])[0] for i in found.prompts})} prompts")
        first = (found.rows or found.prompts)[0]
        text = _joined(spoken(held_out.rows[first]))
        text = text if len(text) <= 60 else text[:59] + "…"
        why = "" if found.rows else ": answers to one prompt are alike, and the probe may know the prompt"
        raise ValueError(
            f"{' and '.join(counts)} of the {what} are among the fit's, the first is row {first}, {text!r} – expected data "
            f"that the fit did not see{why}. Case, white space and form (text, messages, prompt and completion) make no other "
            "row. Remove them."
        )
    return found.near


def _spoken_rows(examples: Examples, what: str) -> list[Spoken]:
    found = []
    for i, row in enumerate(examples.rows):
        try:
            found.append(spoken(row))
        except ValueError as error:
            raise ValueError(f"Row {i} of the {what}: {error}") from None
    return found


def _joined(row: Spoken) -> str:
    return " ".join(row).strip()


def _shared(fit: Sequence[Spoken], rows: Sequence[Spoken]) -> tuple[list[int], list[int]]:
    """Numbers of the rows that are among the fit's, and of those whose prompt is."""
    wholes = {_joined(row) for row in fit}
    prompts = {prompt for prompt, _ in fit if prompt}
    # A text is another row's answer, or its prompt and answer written without a space, as Chinese is.
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
    """Per row that is not in `skip`, the fit's row that is most like it, where one is like enough; the first of equals."""
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
    """Best match among `texts[:split]` of each wanted one of `texts[split:]`: row, other, Jaccard similarity.

    Exact, and without a comparison of all pairs (prefix filtering; Bayardo, Ma and Srikant 2007): sets with a similarity of at
    least t share one of the n − ⌈tn⌉ + 1 rarest of the n members of either. Candidates share one; only they are compared.
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
    found = []
    for start in range(0, len(wanted), COMPARED_ROWS):
        chunk: np.ndarray = split + wanted[start : start + COMPARED_ROWS]
        shared = prefix[chunk] @ others
        for i, row in enumerate(chunk.tolist()):
            candidates = np.sort(shared.indices[shared.indptr[i] : shared.indptr[i + 1]])
            small, large = np.minimum(sizes[candidates], sizes[row]), np.maximum(sizes[candidates], sizes[row])
            candidates = candidates[small >= SIMILAR * large]
            if not candidates.size:
                continue
            own = shingles.indices[shingles.indptr[row] : shingles.indptr[row + 1]]
            member[own] = 1
            both = fit[candidates] @ member
            member[own] = 0
            similarity = both / (sizes[candidates] + sizes[row] - both)
            k = int(similarity.argmax())
            if similarity[k] >= SIMILAR:
                found.append((row - split, int(candidates[k]), float(similarity[k])))
    return found


def _shingles(texts: Sequence[str]) -> Any:
    """Hashed shingles of each text as a sparse matrix of ones (N, columns), the rarest columns first, without common ones."""
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
    found = csr_array((np.ones(indices.size, dtype=np.int32), indices, ends), shape=(len(rows), max(used.size, 1)))
    found.sort_indices()
    return found


def _hashed(text: str) -> np.ndarray:
    """Columns of the shingles of a text, each once."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = max(letters.size - SHINGLE + 1, 0)
    value = np.zeros(count, dtype=np.uint64)
    for k in range(SHINGLE):
        value = value * np.uint64(0x9E3779B97F4A7C15) + letters[k : k + count]
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # mixed: the highest bits depend on all
    return np.unique((value >> np.uint64(42)).astype(np.int32))
