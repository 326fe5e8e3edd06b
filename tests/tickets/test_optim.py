"""Fused optimisers: torch's numbers, state and hooks, and zeros where weights are pruned."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_tickets import SparseLinear, optim, sparsify_

VARIANTS = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "betas": (0.5, 0.9)}),
    ("Adam", {"maximize": True, "eps": 1e-3}),
    ("AdamW", {"weight_decay": 0.1}),
    ("SGD", {"lr": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "maximize": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "alpha": 0.9}),
]
STEPS = 5
pytestmark = pytest.mark.usefixtures("looks")


def _net(density=1.0, width=64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(17, width), nn.Tanh(), nn.Linear(width, 6))
    return sparsify_(net, density=density) if density < 1 else net


def _train(net, optimizer, steps=STEPS, dtype=torch.float32, clip=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 17, generator=generator).to(dtype)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()


def _neighbour(net):
    """The net an ulp away: RMSprop divides by roots of gradients near zero."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)
    return net


def _assert_close(net, exact, *singles):
    """As near to float64 as the farthest of torch's own float32 runs, to a factor."""
    runs = zip(*(single.parameters() for single in singles), strict=True)
    for ours, want, theirs in zip(net.parameters(), exact.parameters(), runs, strict=True):
        allowed = 4 * max((each.double() - want).abs().max() for each in theirs) + 1e-7
        assert (ours.double() - want).abs().max() <= allowed


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_steps_equal_torchs(name, options, density, clip):
    net, single, exact = _net(density), _net(density), _net(density).double()
    near = _neighbour(single)
    ours, theirs = getattr(optim, name), getattr(torch.optim, name)
    optimizer = ours(net.parameters(), max_grad_norm=clip, **options)
    peer, other, reference = (theirs(n.parameters(), **options) for n in (single, near, exact))
    _train(net, optimizer)
    assert optimizer._table is not None
    _train(single, peer, clip=clip)
    _train(near, other, clip=clip)
    _train(exact, reference, dtype=torch.float64, clip=clip)
    _assert_close(net, exact, single, near)
    assert isinstance(optimizer, theirs)
    for p, q in zip(net.parameters(), single.parameters(), strict=True):
        assert optimizer.state[p].keys() == peer.state[q].keys()
        for key, value in peer.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=2e-3, atol=1e-6)
    for layer in net:
        if isinstance(layer, SparseLinear):
            assert not layer.weight[~layer.mask].any()
            for value in optimizer.state[layer.weight].values():
                if value.shape == layer.mask.shape:
                    assert not value[~layer.mask].any()


def test_without_memory_a_huge_gradient_is_forgotten():
    layer = SparseLinear(4, 4).prune_(0.5)
    optimizer = optim.Adam(layer.parameters(), betas=(0.0, 0.999))
    for size in (1e8, 1.0):
        layer.weight.grad = torch.full((4, 4), size)
        optimizer.step()
        assert torch.equal(optimizer.state[layer.weight]["exp_avg"], size * layer.mask)


def test_large_tensors_do_not_depend_on_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            net = _net(width=2048)
            optimizer = optim.Adam(net.parameters(), max_grad_norm=0.01)
            torch.manual_seed(3)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            found.append([p.detach().clone() for p in net.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_garbage_off_the_mask_is_not_used(density):
    net = _net(density)
    clean = copy.deepcopy(net)
    for model in (net, clean):
        model(torch.ones(4, 17)).sum().backward()
    for layer in net:
        if isinstance(layer, SparseLinear):
            layer.weight.grad[~layer.mask] = torch.nan
    norms = []
    for model in (net, clean):
        optimizer = optim.AdamW(model.parameters(), max_grad_norm=0.1)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert norms[0] == norms[1] > 0
    for p, q in zip(net.parameters(), clean.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pruned_between_steps_and_made_sparse_after_the_first():
    net = _net()
    optimizer = optim.Adam(net.parameters(), weight_decay=0.1)
    _train(net, optimizer, 2)
    sparsify_(net, density=0.5)
    for density in (0.5, 0.2, 0.05):
        net[0].prune_(density)
        _train(net, optimizer, 2)
        with torch.no_grad():
            net[0].weight.add_(1.0)
        _train(net, optimizer, 1)
        layer = net[0]
        assert not layer.weight[~layer.mask].any()
        for key in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[layer.weight][key][~layer.mask].any()
            assert optimizer.state[layer.weight][key][layer.mask].any()


@pytest.mark.parametrize(("name", "options"), [VARIANTS[1], VARIANTS[5], VARIANTS[10]])
def test_checkpoints_travel_both_ways(name, options):
    classes = getattr(optim, name), getattr(torch.optim, name)
    for first, second in (classes, classes[::-1]):
        net, straight = _net(), _net()
        one = first(net.parameters(), **options)
        _train(net, one, 3)
        other = second(net.parameters(), lr=7.0)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        _train(net, other, 3, seed=2)
        peer = classes[1](straight.parameters(), **options)
        _train(straight, peer, 3)
        _train(straight, peer, 3, seed=2)
        for p, q in zip(net.parameters(), straight.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(copier):
    net = _net(0.3)
    optimizer = optim.Adam(net.parameters(), max_grad_norm=0.01)
    _train(net, optimizer)
    twin, again = copier((net, optimizer))
    assert again.max_grad_norm == 0.01
    _train(net, optimizer)
    _train(twin, again)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_groups_schedulers_and_added_parameters():
    nets, made = [_net(), _net()], []
    for net, library in zip(nets, (optim, torch.optim), strict=True):
        groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": [net[2].bias]}]
        optimizer = library.SGD(groups, lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(6):
            _train(net, optimizer, 1, seed=step)
            scheduler.step()
            if step == 2:
                optimizer.add_param_group({"params": [net[2].weight], "lr": 0.05})
        made.append(optimizer)
    assert [g["lr"] for g in made[0].param_groups] == [g["lr"] for g in made[1].param_groups]
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_tensor_of_learning_rate_is_read_at_every_step():
    net, lr = _net(), torch.tensor(0.0)
    optimizer = optim.Adam(net.parameters(), lr=lr)
    before = net[0].weight.detach().clone()
    _train(net, optimizer, 2)
    assert torch.equal(net[0].weight, before)
    lr.fill_(0.1)
    _train(net, optimizer, 1)
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize(
    ("name", "setting", "value", "needs"),
    [
        ("SGD", "momentum", 0.9, None),
        ("SGD", "nesterov", True, None),
        ("Adam", "amsgrad", True, "max_exp_avg_sq"),
        ("RMSprop", "momentum", 0.9, "momentum_buffer"),
        ("RMSprop", "centered", True, "grad_avg"),
    ],
)
def test_settings_that_need_other_state_are_seen(name, setting, value, needs):
    """A compiled step on state that is not there would end the process."""
    nets = [_net(0.1), _net(0.1)]
    pair = [
        getattr(lib, name)(net.parameters())
        for lib, net in zip((optim, torch.optim), nets, strict=True)
    ]
    for net, optimizer in zip(nets, pair, strict=True):
        _train(net, optimizer)
        optimizer.param_groups[0][setting] = value
        if needs is None:
            _train(net, optimizer)
            continue
        # As torch, which makes this state only with a parameter's first step.
        with pytest.raises(KeyError, match=needs):
            _train(net, optimizer)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


def test_a_state_of_other_shapes_raises_as_in_torch():
    small, large = _net(width=8), _net(width=64)
    donor, optimizer = optim.Adam(small.parameters()), optim.Adam(large.parameters())
    _train(small, donor)
    _train(large, optimizer)
    optimizer.load_state_dict(donor.state_dict())
    assert "state of shape" in optimizer.plan()[0].reason
    with pytest.raises(RuntimeError, match="size of tensor"):
        _train(large, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_counts_of_steps_of_any_dtype(dtype):
    nets = [_net(), _net()]
    pair = [optim.Adam(nets[0].parameters()), torch.optim.Adam(nets[1].parameters())]
    for net, optimizer in zip(nets, pair, strict=True):
        _train(net, optimizer)
        state = optimizer.state_dict()
        for values in state["state"].values():
            values["step"] = values["step"].to(dtype)
        optimizer.load_state_dict(state)
        _train(net, optimizer)
        assert all(values["step"] == 2 * STEPS for values in optimizer.state.values())
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


def test_default_dtype_does_not_matter():
    nets = [_net(), _net()]
    pair = [optim.Adam(nets[0].parameters()), torch.optim.Adam(nets[1].parameters())]
    torch.set_default_dtype(torch.float64)
    try:
        for net, optimizer in zip(nets, pair, strict=True):
            for _ in range(3):
                for p in net.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


def test_a_parameter_listed_twice_steps_twice_as_in_torch():
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        pair = [optim.Adam([ours, ours]), torch.optim.Adam([theirs, theirs])]
    for _ in range(3):
        for p, optimizer in zip((ours, theirs), pair, strict=True):
            p.grad = torch.ones(3)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_lazy_parameters_wait_for_their_first_batch():
    lazy, other = nn.LazyLinear(4), nn.Linear(3, 3)
    optimizer = optim.Adam([*other.parameters(), *lazy.parameters()])
    other(torch.ones(1, 3)).sum().backward()
    before = other.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(other.weight, before)
    lazy(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert optimizer.plan()[0].format == "fused"
    assert optimizer.state[lazy.weight]["step"] == 1


def test_an_empty_parameter_counts_its_steps():
    empty = nn.Parameter(torch.empty(0))
    optimizer = optim.Adam([empty])
    for _ in range(3):
        empty.grad = torch.empty(0)
        optimizer.step()
    assert optimizer.state[empty]["step"] == 3


def test_an_infinite_limit_measures_the_norm():
    net = _net(0.5)
    optimizer = optim.Adam(net.parameters(), max_grad_norm=math.inf)
    net(torch.ones(4, 17)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), math.inf)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("kept", [3, 7])
def test_strided_masks(kept):
    layer = SparseLinear(8, 6)
    layer.mask = (torch.arange(8 * 6).reshape(8, 6) % 8 < kept).t()
    layer.apply_mask_()
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    expected = torch.where(layer.mask, layer.weight.detach() - 0.1, 0)
    layer.weight.grad = layer.mask.float()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_without_a_gradient_a_parameter_and_its_state_stay():
    net = _net()
    optimizer = optim.Adam(net.parameters())
    frozen = net[0].weight.detach().clone()
    for step in range(3):
        net(torch.ones(4, 17)).sum().backward()
        if step < 2:
            net[0].weight.grad = None
        optimizer.step()
        assert torch.equal(net[0].weight, frozen) == (step < 2)
    assert optimizer.state[net[0].weight]["step"] == 1
    assert optimizer.state[net[0].bias]["step"] == 3
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


def test_replaced_state_and_moved_memory_are_seen():
    net = _net()
    optimizer = optim.Adam(net.parameters())
    _train(net, optimizer)
    weight = net[0].weight
    optimizer.state[weight]["exp_avg"] = torch.zeros_like(weight)
    weight.data = weight.data.clone()
    old = weight.detach().clone()
    _train(net, optimizer, 1)
    assert optimizer.state[weight]["exp_avg"].any()
    assert not torch.equal(weight, old)
    optimizer.state.clear()
    _train(net, optimizer, 1)
    assert optimizer.state[weight]["step"] == 1


def test_hooks_and_closures():
    net = _net()
    optimizer = optim.Adam(net.parameters())
    called = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: called.append("post"))
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: called.append("global"))

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 17)).square().sum()
        loss.backward()
        called.append("closure")
        return loss

    try:
        with torch.no_grad():
            losses = [float(optimizer.step(closure)) for _ in range(3)]
    finally:
        handle.remove()
    assert losses[0] > losses[1] > losses[2]
    assert called == ["pre", "closure", "post", "global"] * 3


def test_autograd_hears_of_the_step():
    net = _net()
    optimizer = optim.SGD(net.parameters())
    loss = net(torch.ones(4, 17)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_fit_takes_torchs_step_beside_it():
    net, peer = _net(), _net()
    for model in (net, peer):
        model[2].double()
    optimizer = optim.Adam(
        [{"params": net[0].parameters()}, {"params": net[2].parameters()}], max_grad_norm=0.01
    )
    reference = torch.optim.Adam(peer.parameters())
    for _ in range(3):
        for model, each in ((net, optimizer), (peer, reference)):
            each.zero_grad()
            model[2](model[0](torch.ones(4, 17)).double()).square().sum().backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 0.01)
        optimizer.step()
        reference.step()
    for p, q in zip(net.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    fused, other = optimizer.plan()
    assert (fused.format, other.format) == ("fused", "torch")
    assert "float64" in other.reason


def test_gradients_of_any_strides():
    net, peer = _net(), _net()
    pairs = [(net, optim.Adam(net.parameters())), (peer, torch.optim.Adam(peer.parameters()))]
    for _ in range(3):
        for model, optimizer in pairs:
            for p in model.parameters():
                values = torch.linspace(-1, 1, p.numel()).reshape(p.shape[::-1])
                p.grad = values.T if p.ndim == 2 else values
            optimizer.step()
    for p, q in zip(net.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_an_optimiser_of_torchs_goes_on_as_ours(name, options):
    net, single, exact = _net(0.3), _net(0.3), _net(0.3).double()
    kind = getattr(torch.optim, name)
    optimizer, peer, reference = (kind(n.parameters(), **options) for n in (net, single, exact))
    calls, groups, state = [], optimizer.param_groups, optimizer.state
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for fused in (False, True):
        if fused:
            assert optim.fuse_(optimizer) is optimizer
            assert type(optimizer) is getattr(optim, name)
            assert optimizer.param_groups is groups
            assert optimizer.state is state
        _train(net, optimizer)
        _train(single, peer)
        _train(exact, reference, dtype=torch.float64)
    assert optimizer._table is not None
    assert len(calls) == 2 * STEPS
    _assert_close(net, exact, single)
    assert optim.fuse_(optimizer) is optimizer
    copy.deepcopy(optimizer).step()
