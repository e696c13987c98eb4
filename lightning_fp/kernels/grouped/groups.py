"""Groups: which rows of a matrix of tokens are of which expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The groups of a matrix of tokens whose rows are sorted by expert."""

    ends: Tensor
    """int32 [experts]: of each, one past its last row. Equal to the one before: no token."""

    of_row: Tensor
    """int64 [rows]: whose each row is; the number of experts for rows of nobody, at the end."""

    @staticmethod
    def of_sorted(expert_ids: Tensor, experts: int) -> Groups:
        """The groups of rows whose experts are known.

        Args:
            expert_ids: int64 [rows], ascending; `experts` and more for rows of nobody.
            experts: how many there are.
        """
        each = torch.arange(experts, device=expert_ids.device, dtype=expert_ids.dtype)
        ends = torch.searchsorted(expert_ids, each, right=True, out_int32=True)
        return Groups(ends, expert_ids.clamp(max=experts))

    @staticmethod
    def of_counts(counts: Tensor, rows: int) -> Groups:
        """The groups of rows of which it is known how many each expert has.

        Args:
            counts: integers [experts].
            rows: of the matrix, at least as many.
        """
        ends = counts.cumsum(0).to(torch.int32)
        row = torch.arange(rows, device=counts.device, dtype=torch.int32)
        return Groups(ends, torch.searchsorted(ends, row, right=True))

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.ends.shape[0]

    def sizes(self) -> list[int]:
        """How many rows each expert has; on a GPU the host waits for it."""
        before = torch.nn.functional.pad(self.ends, (1, 0))
        return before.diff().tolist()

    def per_row(self, values: Tensor) -> Tensor:
        """Of each row, the value of its expert; 0 for rows of nobody.

        Args:
            values: [experts, ...].

        Returns:
            [rows, ...].
        """
        nobody = values.new_zeros((1, *values.shape[1:]))
        return torch.cat([values, nobody]).index_select(0, self.of_row)

    def column_amax(self, x: Tensor) -> Tensor:
        """Of each expert, the largest magnitudes along its rows.

        Args:
            x: [rows, columns].

        Returns:
            float32 [experts, columns]; 0 where an expert has no row, NaN where it has one.
        """
        index = self.of_row.unsqueeze(1).expand(x.shape)
        amax = x.new_zeros(self.experts + 1, x.shape[1])
        amax.scatter_reduce_(0, index, x.detach().abs(), "amax")
        return amax[:-1].float()

    def amax(self, x: Tensor) -> Tensor:
        """Of each expert, the largest magnitude of all its rows; float32 [experts, 1]."""
        return self.column_amax(x.detach().abs().amax(dim=1, keepdim=True))


def padded(groups: Groups, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Where rows go, so that each group begins and ends at a multiple; the host waits for nothing.

    Args:
        groups: of a matrix.
        multiple: of rows, as hardware wants them.

    Returns:
        int64 [rows], the place of each in a larger matrix, rows of nobody behind all groups; int32
        [experts], the ends of the groups there; and the rows of that matrix.
    """
    rows, experts = groups.of_row.shape[0], groups.experts
    ends = groups.ends.long()
    starts = torch.nn.functional.pad(ends, (1, 0))
    whole = (ends - starts[:-1] + multiple - 1) // multiple * multiple
    there = torch.nn.functional.pad(whole.cumsum(0), (1, 0))
    moved = (there - starts).index_select(0, groups.of_row)
    place = torch.arange(rows, device=ends.device) + moved
    most = rows + experts * (multiple - 1)
    return place, there[1:].to(torch.int32), (most + multiple - 1) // multiple * multiple
