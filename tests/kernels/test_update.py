"""Rewind, Adam and SGD: every backend against torch's optimisers run ticket by ticket."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.update import adam_, rewind_

BACKENDS = ["reference", "cpu", "triton"]
SHAPES = [(3, 37, 23), (1, 1, 1), (2, 1500, 1100), (4, 8, 0), (2, 5, 5), (0, 7, 3), (3, 0, 0)]

DRAWN_ROWS = {
    "tickets": st.integers(0, 3),
    "size": st.integers(0, 1100),
    "data": st.data(),
    "density": st.sampled_from([0.0, 0.1, 1.0]),
}


@pytest.fixture
def poisoned():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def population(tickets, size, prunable, dtype=torch.float32, density=0.5, seed=0):
    """Random rows whose pruned entries are already zero, and learning rates that differ."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tickets, prunable, generator=generator) < density
    rows = {}
    for name in ("weight", "m", "v"):
        row = torch.randn(tickets, size, generator=generator, dtype=dtype)
        row[:, :prunable] *= mask
        rows[name] = row
    rows["v"] = rows["v"].square()
    rows["mask"] = mask
    rows["step"] = torch.arange(tickets)
    rows["lr"] = torch.rand(tickets, generator=generator) * 1e-2 + 1e-3
    return rows


def on(backend, op, **arguments):
    """Run an in-place op on a backend: Triton on the GPU if there is one, else interpreted."""
    if backend == "triton" and torch.cuda.is_available():
        moved = {k: a.cuda() if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
    else:
        moved = arguments
    with use_backend(backend):
        result = op(**moved)
    for name, argument in arguments.items():
        if moved[name] is not argument:
            argument.copy_(moved[name])
    return None if result is None else result.cpu()


def gradient(rows, scale=1.0, seed=1):
    """A gradient that is NaN where it must not be looked at."""
    generator = torch.Generator().manual_seed(seed)
    weight, mask = rows["weight"], rows["mask"]
    grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * scale
    grad[:, : mask.shape[1]][~mask] = float("nan")
    return grad


def close(actual, expected, scale=16.0):
    torch.testing.assert_close(
        actual,
        expected.to(actual.dtype),
        rtol=scale * torch.finfo(actual.dtype).eps,
        atol=scale * torch.finfo(actual.dtype).eps,
    )


def off_mask(tensor, mask):
    return tensor[:, : mask.shape[1]][~mask]


def torch_step(rows, grads, ticket, optimizer_class, max_norm, **options):
    """The unpruned entries of one ticket under torch's optimiser; returns it and the norms."""
    mask = rows["mask"][ticket]
    support = torch.cat([mask, mask.new_ones(rows["weight"].shape[1] - mask.shape[0])])
    parameter = torch.nn.Parameter(rows["weight"][ticket][support].clone())
    optimizer = optimizer_class([parameter], lr=rows["lr"][ticket].item(), **options)
    norms = []
    for grad in grads:
        parameter.grad = grad[ticket][support].clone()
        limit = math.inf if max_norm is None else max_norm
        norms.append(torch.nn.utils.clip_grad_norm_([parameter], limit))
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter], torch.stack(norms), support


@pytest.mark.parametrize(("max_norm", "beta1"), [(0.5, 0.9), (1e3, 0.9), (None, 0.9), (0.5, 0.0)])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("cpu", torch.float64),
        ("cpu", torch.float32),
        ("triton", torch.float32),
    ],
)
def test_adam_is_torch_adam_after_clip_grad_norm(backend, dtype, max_norm, beta1):
    steps = 5 if backend == "triton" else 60
    exact = population(4, 61, 40, torch.float64)
    exact["step"].zero_()
    exact["m"].zero_()
    exact["v"].zero_()
    rows = {name: row.clone() for name, row in exact.items()}
    for name in ("weight", "m", "v"):
        rows[name] = rows[name].to(dtype)
    grads = [gradient(exact, scale=10 ** (-i % 3), seed=i) for i in range(steps)]
    norms = []
    for grad in grads:
        norms.append(
            on(backend, adam_, grad=grad.to(dtype), max_norm=max_norm, beta1=beta1, **rows)
        )
    norms = torch.stack(norms)
    for ticket in range(4):
        options = {"betas": (beta1, 0.999), "eps": 1e-5}
        weight, state, expected_norms, support = torch_step(
            exact, grads, ticket, torch.optim.Adam, max_norm, **options
        )
        close(norms[:, ticket], expected_norms)
        close(rows["weight"][ticket][support], weight, scale=16 * steps**0.5)
        close(rows["m"][ticket][support], state["exp_avg"], scale=32)
        close(rows["v"][ticket][support], state["exp_avg_sq"], scale=32)
    assert rows["step"].tolist() == [steps] * 4
    for name in ("weight", "m", "v"):
        assert (off_mask(rows[name], rows["mask"]) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_memory_a_huge_gradient_is_forgotten(backend):
    """``m + (g - m)`` would be 0 here: the moment is the last gradient."""
    rows = population(2, 20, 20, torch.float32) | {"mask": None}
    for size in (1e8, 1.0):
        grad = torch.full((2, 20), size)
        on(backend, adam_, grad=grad, max_norm=None, beta1=0.0, **rows)
        assert (rows["m"] == size).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_adam_agrees_with_reference_in_float64(backend, shape):
    rows = population(*shape)
    exact = {name: row.clone() for name, row in rows.items()}
    for name in ("weight", "m", "v"):
        exact[name] = exact[name].double()
    grad = gradient(rows)
    given_grad = grad.clone()
    norm = on(backend, adam_, grad=grad, **rows)
    expected = on("reference", adam_, grad=grad.double(), **exact)
    close(norm, expected)
    for name in ("weight", "m", "v"):
        close(rows[name], exact[name])
        assert (off_mask(rows[name], rows["mask"]) == 0).all()
    assert torch.equal(rows["step"], exact["step"])
    assert torch.equal(grad.nan_to_num(), given_grad.nan_to_num())


def test_triton_norm_of_a_row_with_several_blocks_per_partial_sum(monkeypatch):
    gpu = pytest.importorskip("sparse_tickets.kernels.update.gpu")
    monkeypatch.setattr(gpu, "MAX_PARTIALS", 2)
    rows = population(2, 5000, 4100)
    exact = {name: row.double() if row.is_floating_point() else row for name, row in rows.items()}
    exact["step"] = rows["step"].clone()
    grad = gradient(rows)
    norm = on("triton", adam_, grad=grad, **rows)
    close(norm, on("reference", adam_, grad=grad.double(), **exact))
    close(rows["weight"], exact["weight"])


@pytest.mark.parametrize("stretches", [1, 2, 5])
def test_triton_adds_stretches_of_a_gradient(stretches):
    gpu = pytest.importorskip("sparse_tickets.kernels.update.gpu")
    rows = population(3, 2100, 1050)
    exact = {name: row.double() if row.is_floating_point() else row for name, row in rows.items()}
    exact["step"] = rows["step"].clone()
    grad = torch.stack([gradient(rows, seed=i) for i in range(stretches)], 1)
    expected = on("reference", adam_, grad=grad.double().sum(1), **exact)
    norm = torch.full((3,), torch.nan)
    arguments = {"grad": grad, **rows, "norm": norm}
    numbers = {"max_norm": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-5}
    assert on("triton", gpu.adam_, **arguments, **numbers) is norm
    close(norm, expected)
    for name in ("weight", "m", "v"):
        close(rows[name], exact[name])
    assert torch.equal(rows["step"], exact["step"])


@pytest.mark.parametrize("spans", [((0, 0),), ((0, 37),), ((3, 5), (20, 31)), ((23, 24), (36, 37))])
def test_triton_leaves_frozen_spans_alone(spans):
    gpu = pytest.importorskip("sparse_tickets.kernels.update.gpu")
    rows, frozen = population(2, 37, 23), torch.zeros(37, dtype=torch.bool)
    for begin, end in spans:
        frozen[begin:end] = True
    # Whatever lies there, off the mask or on it, and whatever its gradient.
    rows["weight"][:, frozen], rows["m"][:, frozen], grad = 3.0, 5.0, gradient(rows)
    grad[:, frozen] = float("nan")
    before = {name: row.clone() for name, row in rows.items()}
    exact = {name: row.double() if row.is_floating_point() else row for name, row in rows.items()}
    exact["step"] = rows["step"].clone()
    expected = on("reference", adam_, grad=grad.masked_fill(frozen, 0).double(), **exact)
    arguments = {"grad": grad, **rows}
    numbers = {"max_norm": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-5}
    bounds = tuple(bound for span in spans for bound in span)
    norm = on("triton", gpu.adam_, **arguments, **numbers, frozen=bounds)
    close(norm, expected)
    for name in ("weight", "m", "v"):
        close(rows[name][:, ~frozen], exact[name][:, ~frozen])
        assert torch.equal(rows[name][:, frozen], before[name][:, frozen])
    assert torch.equal(rows["step"], before["step"] + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 1030])
def test_no_mask_counts_every_entry(backend, size):
    rows = population(2, size, size)
    rows["mask"][:] = True
    masked = {name: row.clone() for name, row in rows.items()}
    grad = torch.randn(2, size)
    norm = on(backend, adam_, grad=grad, **rows | {"mask": None})
    close(norm, on(backend, adam_, grad=grad, **masked))
    close(rows["weight"], masked["weight"])
    initial, source = torch.rand(2, size), torch.rand(2, size)
    m, v = torch.full((2, 2, size), float("nan"))
    rewound = {"weight": rows["weight"], "initial": initial, "m": m, "v": v, "mask": None}
    on(backend, rewind_, **rewound, initial_v=source)
    assert torch.equal(rows["weight"], initial)
    assert torch.equal(v, source)
    assert not m.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_norm_is_written(backend, poisoned):
    for shape in ((3, 40, 20), (2, 0, 0), (0, 4, 4)):
        rows = population(*shape)
        assert on(backend, adam_, grad=gradient(rows), **rows).isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_ticket_does_not_depend_on_its_company(backend):
    together = population(5, 1300, 1234)
    alone = {name: row.clone() for name, row in together.items()}
    grad = gradient(together)
    norm = on(backend, adam_, grad=grad, **together)
    for ticket in range(5):
        single = {name: row[ticket : ticket + 1] for name, row in alone.items()}
        single_norm = on(backend, adam_, grad=grad[ticket : ticket + 1], **single)
        assert torch.equal(single_norm, norm[ticket, None])
    for name, row in together.items():
        assert torch.equal(row, alone[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dirty_pruned_entries_become_zero_and_never_count(backend):
    rows = population(2, 20, 20)
    rows["mask"][0] = False
    for name in ("weight", "m", "v"):
        rows[name][:, :20][~rows["mask"]] = float("nan")
    norm = on(backend, adam_, grad=gradient(rows), **rows)
    assert norm[0] == 0
    assert norm[1] > 0
    for name in ("weight", "m", "v"):
        assert (off_mask(rows[name], rows["mask"]) == 0).all()
        assert rows[name].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_diverged_ticket_shows_and_spares_the_others(backend):
    rows = population(2, 20, 10)
    grad = gradient(rows)
    grad[0, 15] = float("nan")
    norm = on(backend, adam_, grad=grad, **rows)
    assert norm[0].isnan()
    assert rows["weight"][0, 10:].isnan().all()
    assert rows["weight"][1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rewind(backend, late, shape):
    rows = population(*shape)
    initial, initial_m, initial_v = (torch.randn(rows["weight"].shape) for _ in range(3))
    mask, prunable = rows["mask"], shape[2]
    weight, m, v = (torch.full_like(initial, float("nan")) for _ in range(3))
    moments = {"initial_m": initial_m, "initial_v": initial_v} if late else {}
    arguments = {"weight": weight, "initial": initial, "m": m, "v": v, "mask": mask}
    on(backend, rewind_, **arguments, **moments)
    for actual, source in ((weight, initial), (m, initial_m), (v, initial_v)):
        expected = source.clone()
        expected[:, :prunable][~mask] = 0
        if source is not initial and not late:
            expected.zero_()
        assert torch.equal(actual, expected)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(**DRAWN_ROWS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_adam_on_any_shape(backend, tickets, size, data, density):
    prunable = data.draw(st.integers(0, size))
    rows = population(tickets, size, prunable, density=density)
    exact = {name: row.clone() for name, row in rows.items()}
    for name in ("weight", "m", "v"):
        exact[name] = exact[name].double()
    grad = gradient(rows)
    expected = on("reference", adam_, grad=grad.double(), **exact)
    close(on(backend, adam_, grad=grad, **rows), expected)
    for name in ("weight", "m", "v"):
        close(rows[name], exact[name])


@settings(deadline=None, max_examples=15, derandomize=True)
@given(**DRAWN_ROWS, late=st.booleans())
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_rewind_on_any_shape(backend, tickets, size, data, density, late):
    rows = population(tickets, size, data.draw(st.integers(0, size)), density=density)
    point = {"initial_m": gradient(rows, seed=2)} if late else {}
    moments = {name: rows[name] for name in ("weight", "m", "v", "mask")}
    expected = {name: row.clone() for name, row in moments.items()}
    initial = gradient(rows, seed=3)
    on("reference", rewind_, initial=initial, **expected, **point)
    on(backend, rewind_, initial=initial, **moments, **point)
    for name, row in moments.items():
        assert torch.equal(row, expected[name])


def test_inputs_may_be_strided_and_parameters_may_require_grad():
    rows = population(3, 12, 9)
    expected = {name: row.clone() for name, row in rows.items()}
    grad = gradient(rows)
    adam_(grad=grad, **expected)
    rows["weight"].requires_grad_()
    rows["mask"] = rows["mask"].t().contiguous().t()
    version = rows["weight"]._version
    norm = adam_(grad=grad.t().contiguous().t(), **rows)
    assert not norm.requires_grad
    assert rows["weight"].is_leaf
    assert torch.equal(rows["weight"].detach(), expected["weight"])
    assert rows["weight"]._version > version


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(2, 5)}, ValueError, r"grad must have shape \(2, 6\), got \(2, 5\)"),
        ({"grad": torch.zeros(2, 6).double()}, TypeError, "grad must be float32, got float64"),
        ({"mask": torch.ones(2, 7).bool()}, ValueError, r"mask must have shape \(2, N"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must be bool"),
        ({"step": torch.zeros(2)}, TypeError, "step must be int64"),
        ({"lr": torch.zeros(3)}, ValueError, r"lr must have shape \(2,\)"),
        ({"m": torch.zeros(6, 2).t()}, ValueError, "m must be contiguous"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be > 0 or None, got 0.0"),
        ({"beta2": 1.0}, ValueError, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0"),
        ({"weight": torch.zeros(12)}, ValueError, r"weight must have shape \(P, T\)"),
        ({"weight": torch.zeros(2, 6).half()}, TypeError, "weight must be float32 or float64"),
        ({"m": torch.zeros(2, 6, device="meta")}, ValueError, "m must be on cpu, got meta"),
        ({"grad": torch.zeros(2, 6, device="meta")}, ValueError, "grad must be on cpu"),
        ({"mask": torch.ones(2, 4, device="meta").bool()}, ValueError, "mask must be on cpu"),
        ({"lr": torch.zeros(2, device="meta")}, ValueError, "lr must be on cpu, got meta"),
        ({"v": torch.zeros(2, 1).expand(2, 6)}, ValueError, "v must be contiguous"),
        ({"step": torch.zeros((), dtype=torch.int64).expand(2)}, ValueError, "step must be contig"),
    ],
)
def test_adam_refuses(change, error, message):
    rows = population(2, 6, 4)
    rows["grad"] = torch.zeros(2, 6)
    with pytest.raises(error, match=message):
        adam_(**(rows | change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_that_share_memory_are_refused(backend):
    rows = population(2, 6, 4)
    names = ("weight", "m", "v", "mask")
    initial = torch.zeros(2, 6)
    overlapping = torch.zeros(20)
    shifted = {"weight": overlapping[:12].view(2, 6), "m": overlapping[6:18].view(2, 6)}
    for change in (
        {"m": rows["weight"]},
        {"v": rows["m"]},
        {"v": rows["m"].view(-1).view(2, 6)},
        shifted,
    ):
        with use_backend(backend), pytest.raises(ValueError, match="must not share memory with"):
            adam_(grad=initial, **(rows | change))
        some = {name: rows[name] for name in names} | change
        with use_backend(backend), pytest.raises(ValueError, match="must not share memory with"):
            rewind_(initial=initial, **some)
    for change in ({"grad": rows["weight"]}, {"grad": rows["v"]}):
        with use_backend(backend), pytest.raises(ValueError, match="must not share memory with"):
            adam_(**(rows | change))
    some = {name: rows[name] for name in names}
    for change in ({"initial": rows["m"]}, {"initial_m": rows["weight"]}):
        sources = {"initial": initial} | change
        with use_backend(backend), pytest.raises(ValueError, match="must not share memory with"):
            rewind_(**sources, **some)
    for name in names:
        assert not rows[name].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_may_be_rewound_to_itself(backend):
    rows = population(2, 6, 4)
    weight, m = rows["weight"].normal_(), rows["m"]
    expected = weight.clone()
    expected[:, :4][~rows["mask"]] = 0
    if backend == "triton" and torch.cuda.is_available():
        weight, m, rows = weight.cuda(), m.cuda(), {name: row.cuda() for name, row in rows.items()}
    with use_backend(backend):
        rewind_(weight, weight, m, rows["v"], rows["mask"], initial_m=m)
    assert torch.equal(weight.cpu(), expected)


def test_triton_takes_float32_only():
    rows = population(2, 6, 4, torch.float64)
    with pytest.raises(TypeError, match="must be float32, got float64"):
        on("triton", adam_, grad=gradient(rows), **rows)


def test_launches_from_several_threads_and_any_torch_thread_count():
    rows = [population(8, 600, 500, seed=seed) for seed in range(4)]
    expected = [{name: row.clone() for name, row in each.items()} for each in rows]
    for each in expected:
        for _ in range(20):
            adam_(grad=gradient(each), **each)

    def work(each):
        for _ in range(20):
            adam_(grad=gradient(each), **each)

    threads = [threading.Thread(target=work, args=(each,)) for each in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, alone in zip(rows, expected, strict=True):
        assert torch.equal(each["weight"], alone["weight"])
