"""Decisions that several processes make together.

In: what one process sees. Out: what all of them go by. Every function is called by all ranks, at the same place of their work,
and costs nothing where there is one process. An error that one rank meets in here ends all of them, with its message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Gathered = TypeVar("Gathered")


def several() -> bool:
    """True if there are other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and _size() > 1


def is_rank_zero() -> bool:
    """True if this process is the one that decides and writes."""
    return not several() or torch.distributed.get_rank() == 0


def most_of_all_ranks(count: int, device: torch.device) -> int:
    """The largest of the ranks' counts."""
    if not several():
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def sum_of_all_ranks(values: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """Elementwise sum over the ranks of an `Accelerator`, which call this together."""
    if accelerator.num_processes == 1:
        return values
    total: torch.Tensor = accelerator.reduce(values, reduction="sum")
    return total


def from_rank_zero(work: Callable[[], Gathered]) -> Gathered:
    """Result of `work`, which only rank 0 runs.

    Raises:
        `RuntimeError`: `work` failed on rank 0. The other ranks raise this error; rank 0 raises the original.
    """
    if not several():
        return work()
    message: list[Any] = [None, None]
    failed: Exception | None = None
    if is_rank_zero():
        try:
            message[0] = work()
        except Exception as error:  # handed on to all ranks, and raised again below
            failed = error
            message[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(message, src=0)
    if failed is not None:
        raise failed
    if message[1] is not None:
        raise RuntimeError(f"Rank 0 ended the run – {message[1]}")
    return message[0]


def of_all_ranks(mine: list[Gathered]) -> tuple[list[Gathered], int]:
    """The ranks' lists one after the other, and where this rank's begins."""
    if not several():
        return mine, 0
    lists: list[Any] = [None] * _size()
    torch.distributed.all_gather_object(lists, mine)
    first = sum(map(len, lists[: torch.distributed.get_rank()]))
    return [item for own in lists for item in own], first


def raise_on_all_ranks(problem: str | None) -> None:
    """Ends all ranks where one has a problem.

    Raises:
        `ValueError`: a rank's problem; where several have one, the lowest rank's.
    """
    if not several():
        problems = [problem]
    else:
        problems = [None] * _size()
        torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ValueError(found if len(problems) == 1 else f"Rank {rank}: {found}")


def _size() -> int:
    return int(torch.distributed.get_world_size())
