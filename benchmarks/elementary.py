"""The elementary operations that time goes to, each alone.

In: the kind and the sizes of an operation, as `costs.py` lists them. Out: a function that runs it once. It must not know
readouts and terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from costs import Op
from torch.nn.functional import linear as linear_map


def elementary(op: Op) -> Callable[[], Any]:
    """The operation alone, on separate tensors."""
    z = op.sizes
    double = torch.float64 if op.kind.endswith("64") else torch.float32
    if op.kind in ("product", "product64"):
        left, right = torch.randn(z[:2], dtype=double), torch.randn(z[2], z[1], dtype=double).T
        return (lambda: left.mv(right[:, 0])) if z[2] == 1 else (lambda: left @ right)
    if op.kind == "affine":
        inputs, rows, bias = torch.randn(z[:2]), torch.randn(z[2], z[1]), torch.randn(z[2])
        return lambda: linear_map(inputs, rows, bias)
    if op.kind == "mark":
        indices = torch.randn(z[:2]).topk(z[2]).indices
        return lambda: torch.zeros(z[:2], dtype=torch.bool).scatter_(1, indices, True)
    if op.kind == "threshold":
        values, limits = torch.randn(z), torch.zeros(z[1])
        return lambda: values.mul_(values > limits)
    if op.kind in ("point", "point64"):
        values = torch.randn(z, dtype=double)
        return lambda: values * 2
    if op.kind == "pair":
        values, others = torch.randn(z), torch.randn(z)
        return lambda: values - others
    if op.kind == "count":
        of = torch.arange(z[0]) // 128
        return lambda: torch.bincount(of)
    if op.kind in ("gather", "scatter"):
        rows, length, counted, width = z
        values, found = torch.randn(rows, length, width), torch.randn(counted, width)
        mask = (torch.arange(rows * length) >= rows * length - counted).view(rows, length)
        if op.kind == "gather":
            return lambda: values[mask]
        return lambda: torch.zeros(rows, length, width).index_put_((mask,), found, accumulate=True)
    if op.kind in ("reduce", "spread"):
        rows, counted, width = z
        of = torch.arange(counted) * rows // counted
        if op.kind == "spread":
            source = torch.randn(rows, width)
            return lambda: source.index_select(0, of)
        values = torch.randn(counted, width)
        return lambda: torch.zeros(rows, width).index_add(0, of, values)
    if op.kind == "outer":
        column, row = torch.randn(z[0], 1), torch.randn(z[1])
        return lambda: column * row
    if op.kind == "sum":
        values = torch.randn(z)
        return lambda: values.sum(-1)
    if op.kind == "topk":
        values = torch.randn(z[:2])
        return lambda: values.topk(z[2], dim=-1, sorted=False)
    if op.kind == "svd64":
        values = torch.randn(z, dtype=double)
        return lambda: torch.linalg.svdvals(values)
    assert op.kind == "qr64", op.kind
    values = torch.randn(z, dtype=double)
    return lambda: torch.linalg.qr(values, mode="r")


def runner(ops: list[Op]) -> Callable[[], None]:
    """Runs elementary operations one after the other; a result lives until the next one exists."""
    runs = [elementary(op) for op in ops for _ in range(round(op.times))]

    def run() -> None:
        result = None
        for operation in runs:
            result = operation()
        del result

    return run
