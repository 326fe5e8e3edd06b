"""What of a module is sparse, what is not and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparse_tickets.linear import SparseLinear

__all__ = ["Matrix", "Summary", "check_module", "find_matrices", "group_shared", "summary"]

Linear = TypeVar("Linear", bound=nn.Linear)


@dataclass(frozen=True)
class Matrix:
    """One weight of two or more dimensions: what sparsity could save.

    Attributes:
        name: of the layer that holds it.
        kind: that layer's class.
        shape: of the weight; ``()`` while a lazy layer has none.
        kept: weights that are not pruned; all of them in a dense layer.
        dense: why `sparsify_` leaves it dense, or None where it is sparse.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    kept: int
    dense: str | None

    @property
    def weights(self) -> int:
        """How many there are, pruned ones included."""
        return prod(self.shape) if self.shape else 0

    def __str__(self) -> str:
        return f"{self.name!r} ({self.kind} {'x'.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Summary:
    """Every weight matrix of a module, in order; printed, a table."""

    matrices: tuple[Matrix, ...]

    @property
    def weights(self) -> int:
        """Weights of all matrices, sparse and dense."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def covered(self) -> float:
        """The fraction of these that lie in sparse layers."""
        sparse = sum(matrix.weights for matrix in self.matrices if matrix.dense is None)
        return sparse / self.weights if self.weights else 1.0

    @property
    def density(self) -> float:
        """The fraction of these that is kept."""
        kept = sum(matrix.kept for matrix in self.matrices)
        return kept / self.weights if self.weights else 1.0

    def __str__(self) -> str:
        rows = [("layer", "class", "shape", "kept", "")]
        for matrix in self.matrices:
            share = f"{matrix.kept:,} of {matrix.weights:,}"
            note = "" if matrix.dense is None else f"dense: {matrix.dense}"
            shape = " x ".join(map(str, matrix.shape))
            rows.append((matrix.name or "(itself)", matrix.kind, shape, share, note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.append(
            f"density {self.density:.4f} over {self.weights:,} weights, "
            f"{self.covered:.0%} of them in sparse layers"
        )
        return "\n".join(lines)


def summary(module: nn.Module) -> Summary:
    """What of a module is sparse, how sparse, and what `sparsify_` leaves dense and why.

    Args:
        module: any module. A weight under several names appears once, as a sparse layer's if one
            of them is that.

    Raises:
        TypeError: it is no module.

    Example:
        >>> net = nn.Sequential(nn.Embedding(8, 4), SparseLinear(4, 2).prune_(0.5))
        >>> print(summary(net))
        layer  class         shape  kept
        0      Embedding     8 x 4  32 of 32  dense: not an nn.Linear
        1      SparseLinear  2 x 4  4 of 8
        density 0.9000 over 40 weights, 20% of them in sparse layers
    """
    check_module(module)
    return Summary(tuple(find_matrices(module).values()))


def check_module(module: object) -> None:
    """Raise ``TypeError`` if this is none, such as another library's model that holds one."""
    if not isinstance(module, nn.Module):
        way = ": sparse_tickets.integrations.sb3.sparsify_ takes models of Stable-Baselines3"
        raise TypeError(
            f"module must be an nn.Module, got {type(module).__name__}"
            f"{way if hasattr(module, 'policy') else ''}"
        )


def group_shared(layers: Iterable[Linear]) -> list[list[Linear]]:
    """Layers that share a weight, or a mask as targets do; the first one's weight decides."""
    groups: list[list[Linear]] = []
    found: dict[int, list[Linear]] = {}
    for layer in layers:
        shared = [id(layer.weight)]
        if isinstance(layer, SparseLinear):
            shared.append(id(layer.mask))
        group = next((found[key] for key in shared if key in found), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(layer)
        found.update(dict.fromkeys(shared, group))
    return groups


def find_matrices(module: nn.Module) -> dict[int, Matrix]:
    """Every weight matrix by its tensor's ``id``, in order."""
    found: dict[int, Matrix] = {}
    for key, matrix in _matrices(module):
        if key not in found or matrix.dense is None:
            found[key] = matrix
    return found


def _matrices(module: nn.Module) -> Iterator[tuple[int, Matrix]]:
    for name, owner in module.named_modules():
        for label, weight in owner._parameters.items():
            lazy = is_lazy(weight)
            if weight is None or (not lazy and weight.dim() < 2):
                continue
            if lazy and label != "weight":
                continue
            shape = () if lazy else tuple(weight.shape)
            kept, dense = prod(shape) if shape else 0, None
            if isinstance(owner, SparseLinear) and label == "weight":
                kept = kept if owner.mask.is_meta else int(owner.mask.count_nonzero())
            else:
                dense = _reason(owner, lazy)
            yield id(weight), Matrix(*_holder(module, name, owner), shape, kept, dense)


def _holder(module: nn.Module, name: str, owner: nn.Module) -> tuple[str, str]:
    """Name and class of the layer: under a parametrization its weight lies two modules below."""
    if isinstance(owner, parametrize.ParametrizationList):
        above = name.split(".")[:-2]
        name, owner = ".".join(above), module.get_submodule(".".join(above))
        return name, type(owner).__mro__[1].__name__
    return name, type(owner).__name__


def _reason(owner: nn.Module, lazy: bool) -> str:
    if lazy:
        return "it has not seen an input yet"
    if isinstance(owner, parametrize.ParametrizationList):
        return "recomputed by a parametrization"
    if type(owner) is nn.Linear:
        return "not converted"
    if isinstance(owner, nn.Linear):
        return "a subclass of nn.Linear, which may use its weight in ways of its own"
    if isinstance(owner, nn.MultiheadAttention):
        return "attention reads it without a layer"
    return "not an nn.Linear"
