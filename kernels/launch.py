"""How a kernel is launched: numbers by the names it gives them, in which an op may be tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING

_OPTIONS = {"warps": "num_warps", "stages": "num_stages"}


class Launch:
    """Warps, stages, and how work is cut: ``Launch(block=1024, warps=4).block`` is 1024.

    Never changed. Launches of the same numbers are equal.

    Attributes:
        numbers: all of them by name, the default order of a compiled case's name.
        options: Triton's launch options.
        constexprs: the other numbers, in capitals as kernels take them.
    """

    def __init__(self, *, maxnreg: int | None = None, **numbers: int) -> None:
        """``maxnreg`` is Triton's: registers a thread may have. It is not tuned."""
        self.numbers = numbers
        self.options = {_OPTIONS[n]: value for n, value in numbers.items() if n in _OPTIONS}
        if maxnreg is not None:
            self.options["maxnreg"] = maxnreg
        self.constexprs = {n.upper(): value for n, value in numbers.items() if n not in _OPTIONS}
        self.__dict__.update(numbers)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...

    def replace(self, **changed: int) -> Launch:
        """The same but for these numbers.

        Raises:
            TypeError: a name that is none of this launch's.
        """
        if unknown := changed.keys() - self.numbers.keys():
            raise TypeError(f"{self} has no {', '.join(sorted(unknown))}")
        return Launch(maxnreg=self.options.get("maxnreg"), **(self.numbers | changed))

    @property
    def label(self) -> str:
        """For the name of a compiled case."""
        return "_".join(f"{name}{value}" for name, value in self.numbers.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Launch) and (self.numbers, self.options) == (
            other.numbers,
            other.options,
        )

    def __hash__(self) -> int:
        return hash(frozenset(self.numbers.items()))

    def __repr__(self) -> str:
        return f"Launch({', '.join(f'{name}={value}' for name, value in self.numbers.items())})"
