"""Compilations are announced, once each."""

from numba import njit

from sparse_tickets.kernels.compiling import on_compile


def test_outermost_kernel_is_announced_once():
    @njit
    def inner(x):
        return x + 1

    @njit
    def outer(x):
        return inner(x) * 2

    heard = []
    with on_compile(heard.append):
        assert outer(1) == 4
        assert outer(2) == 6
    assert len(heard) == 2
    assert heard[0].endswith("outer")
    assert heard[1] is None
    outer(1.5)
    assert len(heard) == 2
