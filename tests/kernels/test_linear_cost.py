"""Costs of the linear layer, counted by hand: 3 tickets, 5 rows, 32 outputs, 48 inputs."""

import pytest

from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.linear import cost

SIZES = (3, 5, 32, 48)
# Of one ticket: x 240 numbers, y 160, the weight 1536, the bias 32.


@pytest.mark.parametrize(
    ("counted", "flops", "moved"),
    [
        (cost.forward(*SIZES), 15360 + 160, 4 * (240 + 160 + 1536 + 32)),
        (cost.forward(*SIZES, bias=False), 15360, 4 * (240 + 160 + 1536)),
        (cost.forward(*SIZES, itemsize=2), 15360 + 160, 2 * (240 + 160 + 1536 + 32)),
        (cost.dx(*SIZES), 15360, 4 * (160 + 1536 + 240)),
        (cost.dw(*SIZES), 15360, 4 * (160 + 240 + 1536) + 1536),
        (cost.dw(*SIZES, masked=False), 15360, 4 * (160 + 240 + 1536)),
        (cost.db(*SIZES[:3]), 160, 4 * (160 + 32)),
        # Two of six blocks of 16 x 16: 512 weights. Two rows of blocks, three columns.
        (
            cost.blocked_forward(*SIZES, 2, 16),
            5120 + 160,
            4 * (240 + 160 + 512 + 32) + 4 * (2 + 2),
        ),
        (cost.blocked_dx(*SIZES, 2, 16), 5120, 4 * (160 + 512 + 240) + 4 * (3 + 2)),
        (cost.blocked_dw(*SIZES, 2, 16), 5120, 4 * (160 + 240 + 1536) + 4 * (2 + 6)),
        (cost.csr_forward(*SIZES, 100), 1000 + 160, 4 * (240 + 160 + 100 + 32 + 100) + 8 * 33),
        (cost.csr_dx(*SIZES, 100), 1000, 4 * (160 + 240 + 100 + 100) + 8 * 49),
        (cost.csr_dw(*SIZES, 100), 1000, 4 * (160 + 240 + 1536 + 100) + 8 * 33),
    ],
)
def test_counted_by_hand(counted: Cost, flops: int, moved: int) -> None:
    assert counted == Cost(3 * flops, 3 * moved)


def test_full_layouts_compute_what_dense_does() -> None:
    for dense, blocked, csr in (
        (cost.forward, cost.blocked_forward, cost.csr_forward),
        (cost.dx, cost.blocked_dx, cost.csr_dx),
        (cost.dw, cost.blocked_dw, cost.csr_dw),
    ):
        flops = dense(*SIZES).flops
        assert blocked(*SIZES, 6, 16).flops == csr(*SIZES, 1536).flops == flops
        assert dense(*SIZES).bytes < csr(*SIZES, 1536).bytes


def test_blocks_move_less_than_compressed_rows() -> None:
    """The same 512 weights: an index for every 256 of them, or one for each."""
    for blocked, csr in (
        (cost.blocked_forward, cost.csr_forward),
        (cost.blocked_dx, cost.csr_dx),
        (cost.blocked_dw, cost.csr_dw),
    ):
        assert blocked(*SIZES, 2, 16).bytes < csr(*SIZES, 512).bytes
