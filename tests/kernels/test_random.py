"""Philox against its published vectors, and every backend against the reference, bit for bit."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_tickets.kernels import random
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.random import Stream, cpu, reference

BACKENDS = ["cpu", *(["triton"] if has_triton() else [])]
ALL_BACKENDS = ["reference", *BACKENDS]
DRAWS = [random.bits, random.uniform, random.normal, random.permutation]
KEY = torch.tensor([5, -7, 2**62, -(2**63), 2**63 - 1])


@pytest.fixture
def poisoned():
    """What is allocated and not written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on(backend: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the backend runs it: Triton on a GPU, or interpreted on the CPU."""
    return tensor.cuda() if backend == "triton" and torch.cuda.is_available() else tensor


# Random123's kat_vectors: counter, key, words.
VECTORS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

if has_triton():
    import triton
    import triton.language as tl

    from sparse_tickets.kernels.random import gpu

    @triton.jit
    def _philox_kernel(words, out):
        zero = tl.zeros([1], tl.uint32)
        c0 = zero + tl.load(words).to(tl.uint32)
        c1 = zero + tl.load(words + 1).to(tl.uint32)
        c2 = zero + tl.load(words + 2).to(tl.uint32)
        c3 = zero + tl.load(words + 3).to(tl.uint32)
        k0 = zero + tl.load(words + 4).to(tl.uint32)
        k1 = zero + tl.load(words + 5).to(tl.uint32)
        c0, c1, c2, c3 = gpu.philox(c0, c1, c2, c3, k0, k1)
        at = tl.arange(0, 1)
        tl.store(out + at, c0.to(tl.int64))
        tl.store(out + 1 + at, c1.to(tl.int64))
        tl.store(out + 2 + at, c2.to(tl.int64))
        tl.store(out + 3 + at, c3.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_published_vectors(backend, counter, key, words):
    if backend == "reference":
        tensors = [torch.tensor(word) for word in (*counter, *key)]
        got = reference.philox(tuple(tensors[:4]), tuple(tensors[4:]))
    elif backend == "cpu":
        got = cpu.philox(*map(np.uint32, (*counter, *key)))
    else:
        got = on(backend, torch.full((4,), -1))
        _philox_kernel[(1,)](on(backend, torch.tensor((*counter, *key))), got)
    assert tuple(int(word) for word in got) == words


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_counter_and_key_layout(backend):
    key, step, stream = -2_000_000_000_123, (7 << 32) + 9, Stream.MASK
    with use_backend(backend):
        got = random.bits(on(backend, torch.tensor([key])), 11, stream=stream, step=step)[0]
    for i, word in enumerate(got.tolist()):
        counter = tuple(map(torch.tensor, (i // 4, 9, 7, int(stream))))
        key_words = (torch.tensor(key & 0xFFFFFFFF), torch.tensor((key >> 32) & 0xFFFFFFFF))
        assert word == reference.philox(counter, key_words)[i % 4]


def _ulp(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x.abs(), torch.tensor(torch.inf)) - x.abs()


def _check_draw(draw, got, expected):
    if draw is random.normal:
        # float64 logarithm, sine and cosine agree to a few units; one rounding to float32.
        assert bool(((got - expected).abs() <= _ulp(expected) + 1e-15).all())
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    key=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    n=st.sampled_from([0, 1, 2, 3, 4, 5, 7, 64, 1023, 1025]),
    stream=st.sampled_from([0, 3, 2**31, 2**32 - 1]),
    step=st.sampled_from([0, 1, 16, 2**31, 2**32 - 1, 2**32, 2**63 - 1]),
)
@settings(deadline=None, max_examples=15, derandomize=True)
def test_backends_equal_reference(backend, draw, key, n, stream, step):
    key = torch.tensor(key, dtype=torch.int64)
    with use_backend("reference"):
        expected = draw(key, n, stream=stream, step=step)
    with use_backend(backend):
        got = draw(on(backend, key), n, stream=stream, step=step).cpu()
    assert got.shape == (len(key), n)
    assert got.dtype == expected.dtype
    _check_draw(draw, got, expected)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@given(
    key=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2),
    n=st.sampled_from([0, 1, 5, 1025]),
    data=st.data(),
)
@settings(deadline=None, max_examples=6, derandomize=True)
def test_a_step_on_the_device_draws_what_the_integer_draws(backend, key, n, data):
    number = st.one_of(st.sampled_from([0, 2**32 - 1, 2**32]), st.integers(0, 2**63 - 1))
    steps = data.draw(st.lists(number, min_size=len(key), max_size=len(key)))
    keys = on(backend, torch.tensor(key, dtype=torch.int64))
    step = on(backend, torch.tensor(steps, dtype=torch.int64))
    strided = step[:, None].expand(-1, 2).contiguous()[:, 0]
    with use_backend(backend):
        for draw in (*DRAWS, functools.partial(_integers, high=1000)):
            together = draw(keys, n, stream=3, step=strided)
            assert together.shape == (len(key), n)
            for ticket, number in enumerate(steps):
                alone = keys[ticket : ticket + 1]
                expected = draw(alone, n, stream=3, step=number)
                assert torch.equal(together[ticket : ticket + 1], expected)
                assert torch.equal(draw(alone, n, stream=3, step=step[ticket]), expected)


def _integers(key, n, *, high, stream, step):
    return random.integers(key, n, high, stream=stream, step=step)


class _Calls(TorchDispatchMode):
    """Notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("draw", DRAWS)
def test_a_step_on_the_device_is_not_fetched_from_it(draw):
    step = torch.tensor(7)
    with _Calls() as calls:
        draw(KEY, 3, stream=Stream.ACTION, step=step)
    # torch would rather turn the tensor into the integer that the other overload takes.
    packet = getattr(torch.ops.sparse_tickets, f"random_{draw.__name__}")
    assert packet.on_device in calls.ops


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_every_element_is_written(backend, draw, poisoned):
    with use_backend(backend):
        got = draw(on(backend, KEY), 1030, stream=0, step=1).double()
    assert got.isfinite().all()
    assert got.abs().max() < 2**32


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_batch_mates_change_no_bit(backend, draw):
    with use_backend(backend):
        key = on(backend, KEY)
        together = draw(key, 261, stream=1, step=3)
        for ticket in range(len(key)):
            alone = draw(key[ticket : ticket + 1], 261, stream=1, step=3)
            assert torch.equal(alone[0], together[ticket])


@pytest.mark.parametrize("draw", DRAWS[:3])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_first_elements_do_not_depend_on_length(backend, draw):
    with use_backend(backend):
        key = on(backend, KEY)
        long = draw(key, 40, stream=2, step=8)
        for n in (1, 2, 5, 39):
            assert torch.equal(draw(key, n, stream=2, step=8), long[:, :n])


def test_draws_of_other_keys_steps_and_streams_differ():
    rows = [
        random.bits(torch.tensor([key]), 8, stream=stream, step=step)[0]
        for key, stream, step in itertools.product((0, 1, 1 << 32), (0, 1), (0, 1, 1 << 32))
    ]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_strided_keys():
    expected = random.bits(KEY[::2].clone(), 9, stream=0, step=0)
    assert torch.equal(random.bits(KEY[::2], 9, stream=0, step=0), expected)


def test_uniform_lies_in_the_unit_interval_on_a_grid_and_is_flat():
    u = random.uniform(KEY, 40_000, stream=0, step=0)
    assert bool(((u >= 0) & (u < 1)).all())
    assert torch.equal(u, (u * 2**24).floor() * 2.0**-24)
    # Chi-squared of 100 bins over 200,000 draws: mean 99, standard deviation 14.
    counts = torch.histc(u, 100, 0, 1).double()
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 5 * 14


def test_normal_moments():
    x = random.normal(KEY, 40_001, stream=0, step=0).double()
    standard_error = x.numel() ** -0.5
    assert x.mean().abs() < 5 * standard_error
    assert (x.var() - 1).abs() < 5 * 2**0.5 * standard_error
    assert ((x**4).mean() - 3).abs() < 5 * 96**0.5 * standard_error
    pairs = x[:, :40_000].unflatten(1, (-1, 2))
    assert pairs.prod(-1).mean().abs() < 5 * (2**0.5) * standard_error


def test_normal_is_finite_at_the_extreme_words():
    for first, second in itertools.product((0, 2**32 - 1), repeat=2):
        values = np.array(cpu._box_muller(np.uint32(first), np.uint32(second)))
        assert np.isfinite(values).all()
        assert abs(values).max() < 6.7


def test_permutation_breaks_ties_by_position():
    n = 200_000
    words = random.bits(KEY[:1], n, stream=0, step=1)
    assert words.unique().numel() < n, "the case needs a tie"
    expected = words.argsort(dim=1, stable=True)
    assert torch.equal(random.permutation(KEY[:1], n, stream=0, step=1), expected)


def test_integers():
    words = random.bits(KEY, 1000, stream=0, step=0)
    for high in (1, 2, 3, 1000, 2**31):
        got = random.integers(KEY, 1000, high, stream=0, step=0)
        assert torch.equal(got, words * high >> 32)
        assert got.min() >= 0
        assert got.max() < high


def test_fill_functions_write_every_element_and_no_other():
    key, n = KEY[1].item(), 103
    floats = np.full((3, n), np.nan, np.float32)
    cpu.fill_uniform(floats[1], key, 4, 2**40)
    assert np.array_equal(floats[1], random.uniform(KEY[1:2], n, stream=4, step=2**40)[0])
    cpu.fill_normal(floats[1], key, 4, 2**40)
    assert np.array_equal(floats[1], random.normal(KEY[1:2], n, stream=4, step=2**40)[0])
    assert np.isnan(floats[[0, 2]]).all()
    out = np.full((3, n), -1, np.int32)
    words, scratch = np.full((2, n), 77, np.uint32)
    cpu.fill_permutation(out[1], words, np.full(n, -1, np.int32), scratch, key, 4, 2**40)
    assert np.array_equal(out[1], random.permutation(KEY[1:2], n, stream=4, step=2**40)[0])
    assert (out[[0, 2]] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2,), (5, 3), (0, 4), (3, 5, 2), (1, 1), (130, 7)])
def test_categorical_equals_reference(backend, shape, generator):
    probs = torch.rand(shape, generator=generator)
    probs = probs * (torch.rand(shape, generator=generator) > 0.3)
    probs[..., -1] += 1e-3
    u = torch.rand(shape[:-1], generator=generator)
    with use_backend("reference"):
        expected = random.categorical(probs, u)
    with use_backend(backend):
        got = random.categorical(on(backend, probs), on(backend, u)).cpu()
    assert torch.equal(got, expected)
    assert bool((probs.gather(-1, got[..., None]) > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    rows=st.integers(0, 40),
    actions=st.integers(1, 20),
    zeros=st.sampled_from([0.0, 0.5, 0.95]),
    grid=st.sampled_from([3, 2**24]),
    seed=st.integers(0, 99),
)
def test_categorical_of_any_shape(backend, rows, actions, zeros, grid, seed):
    """On coarse grids sums and thresholds are equal often."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randint(1, 5, (rows, actions), generator=generator).float()
    probs *= torch.rand(rows, actions, generator=generator) >= zeros
    probs[torch.arange(rows), torch.randint(actions, (rows,), generator=generator)] = 1.0
    u = torch.randint(grid, (rows,), generator=generator) / grid
    with use_backend("reference"):
        expected = random.categorical(probs, u)
    with use_backend(backend):
        got = random.categorical(on(backend, probs), on(backend, u)).cpu()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(
    ("probs", "u", "index"),
    [
        ([0.25, 0.25, 0.5], 0.0, 0),
        ([0.25, 0.25, 0.5], 0.25, 1),
        ([0.25, 0.25, 0.5], 0.5, 2),
        ([0.0, 1.0, 0.0], 0.0, 1),
        ([0.0, 1.0, 0.0], 1 - 2**-24, 1),
        # The threshold rounds up to the total: the last possible index, not the last.
        ([3e-45, 1e-45, 0.0], 1 - 2**-24, 1),
        ([2.0, 6.0], 0.2, 0),
        ([1.0], 0.9, 0),
    ],
)
def test_categorical_edges(backend, probs, u, index):
    with use_backend(backend):
        got = random.categorical(on(backend, torch.tensor(probs)), on(backend, torch.tensor(u)))
    assert got.item() == index


def test_categorical_frequencies():
    probs = torch.tensor([0.1, 0.2, 0.0, 0.7])
    u = random.uniform(KEY[:1], 100_000, stream=0, step=0)[0]
    index = random.categorical(probs.expand(100_000, 4), u)
    frequency = torch.bincount(index, minlength=4) / 100_000
    assert (frequency - probs).abs().max() < 5 * 0.5 * 100_000**-0.5
    assert frequency[2] == 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("probs", "u"),
    [
        ([0.5, float("nan")], 0.5),
        ([1.5, -0.5], 0.5),
        ([0.0, 0.0], 0.5),
        ([3e38, 3e38], 0.5),
        ([0.5, 0.5], 1.0),
        ([0.5, 0.5], float("nan")),
    ],
)
def test_categorical_refuses_what_is_no_distribution(backend, probs, u):
    rows = torch.stack((torch.tensor([0.5, 0.5]), torch.tensor(probs)))
    with use_backend(backend), pytest.raises(ValueError, match="in row 1"):
        random.categorical(rows, torch.tensor([0.5, u]))


def test_derive_key_is_fixed_and_unambiguous():
    assert random.derive_key("CartPole-v1", "ppo", 3) == -892531715938438272
    parts = [(), ("",), ("ab", "c"), ("a", "bc"), ("1",), (1,), (-1,), (1, 1), (11,), ("1:i1",)]
    keys = {random.derive_key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    for part in (1.0, None, True):
        with pytest.raises(TypeError, match="parts must be"):
            random.derive_key("seed", part)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="key must be int64"):
        random.bits(KEY.int(), 3, stream=0, step=0)
    with pytest.raises(ValueError, match="key must have shape"):
        random.bits(KEY[None], 3, stream=0, step=0)
    for name, arguments in (
        ("n", {"n": -1}),
        ("stream", {"stream": 2**32}),
        ("step", {"step": -1}),
        ("step", {"step": 2**63}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            random.uniform(KEY, **{"n": 3, "stream": 0, "step": 0, **arguments})
    with pytest.raises(TypeError):
        random.uniform(KEY, 3, stream=0, step=0.5)
    for step, error, message in (
        (torch.zeros(4, dtype=torch.int64), ValueError, r"step must have shape \(5,\)"),
        (torch.zeros(5, 1, dtype=torch.int64), ValueError, r"step must have shape \(5,\)"),
        (torch.zeros(5), TypeError, "step must be int64, got float32"),
        (torch.zeros(5, dtype=torch.int64, device="meta"), ValueError, "step must be on cpu"),
    ):
        for draw in DRAWS:
            with pytest.raises(error, match=message):
                draw(KEY, 3, stream=0, step=step)
    with pytest.raises(ValueError, match="u must be on cpu, got meta"):
        random.categorical(torch.ones(2, 3), torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"probs must have shape \(..., A"):
        random.categorical(torch.ones(2, 0), torch.ones(2))
    with pytest.raises(TypeError, match="stream must be an int"):
        random.bits(KEY, 3, stream=1.0, step=0)
    with pytest.raises(ValueError, match="high must be in"):
        random.integers(KEY, 3, 0, stream=0, step=0)
    with pytest.raises(ValueError, match="u must have shape"):
        random.categorical(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match="probs must be float32"):
        random.categorical(torch.ones(2, 3).double(), torch.ones(2))


def test_compiles_to_one_graph_for_every_step():
    def act(key, probs, step):
        u = random.uniform(key, 3, stream=Stream.ACTION, step=step)
        return random.categorical(probs, u)

    probs = torch.tensor([0.3, 0.7]).expand(len(KEY), 3, 2)
    compiled = torch.compile(act, backend="aot_eager", fullgraph=True, dynamic=True)
    for step in (*range(5), torch.tensor(7), KEY.abs()):
        assert torch.equal(compiled(KEY, probs, step), act(KEY, probs, step))
