"""Exact-k pruning: the count, the order and the ties, bit for bit the same on every backend."""

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.launch import Launch
from sparse_tickets.kernels.prune import prune

# "triton long" takes rows as long ones are taken, whatever their length: in several blocks.
TRITON = ["triton", "triton long"] if has_triton() else []
BACKENDS = ["reference", "cpu", *TRITON]


@pytest.fixture
def poisoned():
    """What is allocated and not written is True, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def using(backend):
    """A backend, and for long rows blocks small enough for a test to have several."""
    if backend == "triton long":
        from sparse_tickets.kernels.prune import gpu

        small = (Launch(block=64, warps=8),)
        with mock.patch.object(gpu, "_launches", return_value=small), use_backend("triton"):
            yield
    else:
        with use_backend(backend):
            yield


def device_of(backend):
    """Triton runs on the GPU if there is one, else in the interpreter."""
    return "cuda" if backend in TRITON and torch.cuda.is_available() else "cpu"


def on(backend, *arguments, **options):
    """Prune on a backend, wherever it runs."""
    device = device_of(backend)
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with using(backend):
        return prune(*arguments, **options).cpu()


def by_hand(scores, mask, k):
    """Python's stable sort, ticket by ticket."""
    out = torch.zeros_like(mask)
    for ticket, row in enumerate(scores.tolist()):
        inside = [i for i in range(len(row)) if mask[ticket, i]]
        for i in sorted(inside, key=lambda i: -row[i])[: int(k[ticket])]:
            out[ticket, i] = True
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 512), (2, 513), (0, 5), (3, 0)], ids=str)
def test_keeps_exactly_k_of_the_largest(backend, shape, generator, poisoned):
    tickets, prunable = shape
    for ties in (False, True):
        scores = torch.randn(shape, generator=generator)
        if ties:
            scores = (scores * 2).round()
        mask = torch.rand(shape, generator=generator) < 0.7
        k = torch.randint(0, prunable + 1, (tickets,), generator=generator)
        kept = on(backend, scores, mask, k)
        assert kept.dtype == torch.bool
        assert torch.equal(kept.sum(1), torch.minimum(k, mask.sum(1)))
        assert not (kept & ~mask).any()
        assert torch.equal(kept, by_hand(scores, mask, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_are_ordered(backend, dtype):
    if backend in TRITON and dtype == torch.float64:
        pytest.skip("Triton prunes by float32 scores")
    tiny = torch.finfo(dtype).smallest_normal / 4
    big = torch.finfo(dtype).max
    row = [-0.0, 0.0, math.inf, -math.inf, tiny, -tiny, big, -big, 1.0, -1.0]
    scores = torch.tensor([row], dtype=dtype)
    order = [2, 6, 8, 4, 0, 1, 5, 9, 7, 3]
    mask = torch.ones_like(scores, dtype=torch.bool)
    for k in range(len(row) + 1):
        assert on(backend, scores, mask, k)[0].nonzero()[:, 0].tolist() == sorted(order[:k])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_keep_the_lowest_positions(backend):
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[1, ::2] = False
    for value in (0.0, -1.0, -math.inf):
        kept = on(backend, torch.full((2, 600), value), mask, torch.tensor([500, 170]))
        assert kept[0].nonzero()[:, 0].tolist() == list(range(500))
        assert kept[1].nonzero()[:, 0].tolist() == list(range(1, 340, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_entries_are_never_revived(backend):
    scores = torch.tensor([[math.inf, -math.inf, math.nan, -math.inf]])
    mask = torch.tensor([[False, True, False, True]])
    assert on(backend, scores, mask, 4).tolist() == mask.tolist()
    assert on(backend, scores, mask, 1).tolist() == [[False, True, False, False]]
    assert not on(backend, scores, torch.zeros_like(mask), 4).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, generator):
    scores = torch.randn(3, 50, generator=generator)
    mask = torch.rand(3, 50, generator=generator) < 0.5
    before = scores.clone(), mask.clone()
    kept = on(backend, scores, mask, 10)
    assert torch.equal(scores, before[0])
    assert torch.equal(mask, before[1])
    assert kept.data_ptr() != mask.data_ptr()
    strided = on(backend, scores.t().contiguous().t(), mask.t().contiguous().t(), 10)
    assert not strided.requires_grad
    assert torch.equal(strided, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_magnitude_ranks_absolute_values(backend, generator):
    scores = torch.randn(3, 150, generator=generator)
    scores[1] = (scores[1] * 2).round()
    scores[2, :7] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 0.0])
    mask = torch.rand(3, 150, generator=generator) < 0.8
    mask[2, :7] = True
    for k in (torch.tensor([1, 60, 2]), torch.tensor([150, 0, 148]), 75):
        expected = on("reference", scores.abs(), mask, k)
        assert torch.equal(on(backend, scores, mask, k, criterion="magnitude"), expected)
        wide = torch.cat([scores, torch.full((3, 9), math.nan)], dim=1)
        view = wide.to(device_of(backend))[:, :150]
        assert torch.equal(on(backend, view, mask, k, criterion="magnitude"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ticket_does_not_depend_on_its_company(backend, generator):
    scores = torch.randn(4, 333, generator=generator).round(decimals=1)
    mask = torch.rand(4, 333, generator=generator) < 0.6
    k = torch.tensor([3, 333, 100, 0])
    together = on(backend, scores, mask, k)
    for ticket in range(4):
        row = slice(ticket, ticket + 1)
        assert torch.equal(on(backend, scores[row], mask[row], k[row]), together[row])


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_rows_longer_than_a_program_takes_at_a_time(generator, poisoned):
    from sparse_tickets.kernels.prune import gpu

    prunable = 2 * gpu.MOST + 77
    scores = torch.randn(2, prunable, generator=generator)
    scores[1] = (scores[1] * 8).round()
    mask = torch.rand(2, prunable, generator=generator) < 0.9
    k = torch.tensor([5000, 9000])
    expected = on("reference", scores, mask, k)
    assert torch.equal(on("triton", scores, mask, k), expected)
    assert torch.equal(
        on("triton", scores, mask, k, criterion="magnitude"), on("reference", scores.abs(), mask, k)
    )


SCORE = st.one_of(
    st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])
)


@pytest.mark.long
@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.tuples(SCORE, st.booleans()), max_size=20), st.data())
def test_backends_agree(entries, data):
    scores = torch.tensor([[score for score, _ in entries]]).reshape(1, -1)
    mask = torch.tensor([[inside for _, inside in entries]], dtype=torch.bool).reshape(1, -1)
    k = data.draw(st.integers(0, len(entries)))
    expected = on("reference", scores, mask, k)
    assert torch.equal(expected, by_hand(scores, mask, [k]))
    assert torch.equal(on("cpu", scores.double(), mask, k), expected)
    by_magnitude = by_hand(scores.abs(), mask, [k])
    for backend in BACKENDS:
        assert torch.equal(on(backend, scores, mask, k), expected)
        assert torch.equal(on(backend, scores, mask, k, criterion="magnitude"), by_magnitude)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    tickets=st.integers(0, 3),
    prunable=st.integers(0, 400),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    levels=st.sampled_from([1, 5, 10**6]),
    seed=st.integers(0, 99),
)
def test_triton_on_any_population(tickets, prunable, density, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(tickets, prunable, generator=generator) * levels).round() / levels
    mask = torch.rand(tickets, prunable, generator=generator) < density
    k = torch.randint(0, prunable + 1, (tickets,), generator=generator)
    expected = on("reference", scores, mask, k)
    for backend in TRITON:
        assert torch.equal(on(backend, scores, mask, k), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_inside_the_mask_is_refused_by_name(backend):
    scores = torch.zeros(3, 4)
    scores[1, 2] = math.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="NaN for ticket 1 at entry 2"):
        on(backend, scores, mask, 2)
    on(backend, scores, mask, 2, check=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(6)}, ValueError, r"scores must have shape \(P, N\), got \(6,\)"),
        ({"scores": torch.zeros(2, 3).int()}, TypeError, "scores must be float32 or float64"),
        ({"mask": torch.ones(2, 4).bool()}, ValueError, r"mask must have shape \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, got float32"),
        ({"k": 4}, ValueError, r"k must be in \[0, 3\], got 4"),
        ({"k": -1}, ValueError, r"k must be in \[0, 3\], got -1"),
        ({"k": 1.5}, TypeError, "k must be an int or an int64 tensor, got float"),
        ({"k": torch.tensor([1, 5])}, ValueError, r"k must be in \[0, 3\], got 5 for ticket 1"),
        ({"k": torch.tensor([1])}, ValueError, r"k must have shape \(2,\)"),
        ({"k": torch.tensor([1.0, 2.0])}, TypeError, "k must be int64"),
        ({"k": True}, TypeError, "k must be an int or an int64 tensor, got bool"),
        ({"k": torch.zeros(2, device="meta").long()}, ValueError, "k must be on cpu, got meta"),
        ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, "mask must be on cpu"),
        ({"criterion": "size"}, ValueError, "criterion must be 'score' or 'magnitude', got 'size'"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"scores": torch.zeros(2, 3), "mask": torch.ones(2, 3).bool(), "k": 1}
    with pytest.raises(error, match=message):
        prune(**(arguments | change))
