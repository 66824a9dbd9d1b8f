"""One parameter whose numbers can be reordered in place so that the block that an expert keeps stands first."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PackedParameter:
    """A parameter of a dense model, and the order that its numbers stand in.

    In dense order the numbers of a weight `W` of shape `(out, in, ...)` lie row by row. Packed for kept rows R and
    kept columns C they lie as `W[R][:, C] | W[R][:, not C] | W[not R]`, each row by row: the first block is what a
    cut keeps, contiguous like a tensor of its own.

    Args:
        module, name: where the parameter stands in the dense model, which has it in dense order.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        self._taken: nn.Parameter | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter object of the dense model, in whatever order its numbers stand."""
        return self.module._parameters[self.name] if self._taken is None else self._taken

    def take(self) -> None:
        """Leave an empty parameter in the dense model, so that nothing reads numbers in another order there."""
        if self._taken is None:
            self._taken = self.parameter
            if not self._taken.is_contiguous():  # channels last; what a cut leaves is contiguous as well
                self._taken.data = self._taken.data.contiguous()
            empty = torch.empty(self._taken.shape, dtype=self._taken.dtype, device="meta")
            self.module._parameters[self.name] = nn.Parameter(empty, requires_grad=self._taken.requires_grad)

    def give_back(self) -> None:
        """The dense model's parameter again: the same object with the same numbers."""
        if self._taken is not None:
            self.arrange(None, None)
            self.module._parameters[self.name], self._taken = self._taken, None

    def kept_shape(self, rows: Tensor | None, columns: Tensor | None) -> tuple[int, ...]:
        """Shape of what stays."""
        shape = list(self.parameter.shape)
        if rows is not None:
            shape[0] = int(rows.sum())
        if columns is not None:
            shape[1] = int(columns.sum())
        return tuple(shape)

    def arrange(self, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """Bring the kept rows and columns to the front, in place; memory: one more tensor of this size for a moment.

        Args:
            rows, columns: bool of shape `(out,)` and `(in,)`, True where an entry stays; None where all do.

        Returns:
            The kept block: a contiguous view of the parameter's memory. With neither mask: the whole, in dense order.

        A failure midway leaves the dense order.
        """
        flat = self.parameter.data.view(-1)
        if not (_same(rows, self.rows) and _same(columns, self.columns)):
            dense = self._dense(flat)
            try:
                self._write(flat, dense, rows, columns)
                self.rows, self.columns = rows, columns
            except BaseException:
                flat.copy_(dense.view(-1))
                self.rows = self.columns = None
                raise
        shape = self.kept_shape(rows, columns)
        return flat[: math.prod(shape)].view(shape)

    def _sizes(self) -> tuple[int, int, int]:
        """Rows, columns and the numbers of one entry: (out, in, kernel height times width)."""
        shape = self.parameter.shape
        return shape[0], (shape[1] if len(shape) > 1 else 1), math.prod(shape[2:])

    def _dense(self, flat: Tensor) -> Tensor:
        """A copy in dense order, shape `(out, in, entry)`."""
        out, into, entry = self._sizes()
        if self.rows is None and self.columns is None:
            return flat.clone().view(out, into, entry)
        dense = flat.new_empty(out, into, entry)
        if self.rows is None:
            _fill_columns(dense, flat, self.columns)
            return dense
        kept, gone = _split(self.rows, flat.device)
        first = kept.numel() * into * entry
        top = flat[:first].view(kept.numel(), into, entry)
        if self.columns is not None:
            top = _fill_columns(torch.empty_like(top), flat[:first], self.columns)
        dense.index_copy_(0, kept, top)
        return dense.index_copy_(0, gone, flat[first:].view(gone.numel(), into, entry))

    def _write(self, flat: Tensor, dense: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
        out, into, entry = self._sizes()
        if rows is None and columns is None:
            flat.copy_(dense.view(-1))
            return
        top, first = dense, flat.numel()
        if rows is not None:
            kept, gone = _split(rows, flat.device)
            first = kept.numel() * into * entry
            torch.index_select(dense, 0, gone, out=flat[first:].view(gone.numel(), into, entry))
            if columns is None:
                torch.index_select(dense, 0, kept, out=flat[:first].view(kept.numel(), into, entry))
                return
            top = dense.index_select(0, kept)
        kept, gone = _split(columns, flat.device)
        second = top.shape[0] * kept.numel() * entry
        torch.index_select(top, 1, kept, out=flat[:second].view(top.shape[0], kept.numel(), entry))
        torch.index_select(top, 1, gone, out=flat[second:first].view(top.shape[0], gone.numel(), entry))


def _fill_columns(dense: Tensor, flat: Tensor, columns: Tensor) -> Tensor:
    """`dense` of shape `(rows, in, entry)` from its kept columns and, behind them, the others."""
    rows, _, entry = dense.shape
    at = 0
    for index in _split(columns, flat.device):
        size = rows * index.numel() * entry
        dense.index_copy_(1, index, flat[at : at + size].view(rows, index.numel(), entry))
        at += size
    return dense


def _split(mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices that stay and indices that go, ascending."""
    return mask.nonzero().flatten().to(device), (~mask).nonzero().flatten().to(device)


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))
