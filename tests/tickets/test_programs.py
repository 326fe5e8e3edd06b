"""Sparse policies inside other people's programs: each works, or is refused with the way out.

What is refused stands in `REFUSED`. A program whose library is not installed is skipped.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import assert_zero, draw, make, truth
from sparse_layers import sparse_layers
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_tickets import densify_, optim, sparsify_
from sparse_tickets.linear import SparseLinear
from sparse_tickets.targets import tie_masks_


def learn(policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A few steps, pruned further in between."""
    for step in range(4):
        optimizer.zero_grad()
        policy(draw()).square().mean().backward()
        optimizer.step()
        if step == 1:
            sparsify_(policy, 0.1)


@pytest.mark.parametrize(
    "options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["swa", "ema"]
)
def test_averaged_models_take_over_the_masks(options):
    policy = make()
    average = AveragedModel(policy, **options)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for density in (0.3, 0.3, 0.2, 0.1):
        sparsify_(policy, density)
        learn(policy, optimizer)
        average.update_parameters(policy)
    for layer, follower in zip(sparse_layers(policy), sparse_layers(average), strict=True):
        assert torch.equal(layer.mask, follower.mask)
    x = draw()
    # Reads as zero what an average still holds of weights that were pruned meanwhile.
    expected = average.module[0](x)
    torch.testing.assert_close(expected, truth(average.module)[0](x))
    torch.testing.assert_close(average(x), truth(average.module)(x))


def test_an_average_of_buffers_needs_tied_masks():
    """torch averages bool buffers by arithmetic, so that what is pruned once stays kept."""
    policy = make()
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    tie_masks_(average.module, policy)
    for density in (0.3, 0.2):
        sparsify_(policy, density)
        average.update_parameters(policy)
        assert average.module[2].mask is policy[2].mask
    assert policy[2].density < 0.2


def test_an_average_that_copies_masks():
    """docs/guarantees.md's, where torch's own stops at bools."""

    def average(mean, new, count):
        return torch.lerp(mean, new, 1 / (count + 1)) if mean.is_floating_point() else new

    policy = make()
    plain, ours = (AveragedModel(policy, avg_fn=f, use_buffers=True) for f in (None, average))
    plain.update_parameters(policy)
    with pytest.raises(RuntimeError, match="with two bool tensors"):
        plain.update_parameters(policy)
    weights = []
    for density in (0.3, 0.1):
        sparsify_(policy, density)
        ours.update_parameters(policy)
        weights.append(policy[2].weight.detach().clone())
        assert torch.equal(ours.module[2].mask, policy[2].mask)
    torch.testing.assert_close(ours.module[2].weight, torch.stack(weights).mean(0))
    x = draw()
    torch.testing.assert_close(ours(x), truth(ours.module)(x))


def test_targets_by_lerp_of_parameters():
    policy = make()
    target = copy.deepcopy(policy)
    learn(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    tie_masks_(target, policy)
    for slow, fast in zip(target.parameters(), policy.parameters(), strict=True):
        slow.data.lerp_(fast.data, 0.1)
    assert_zero(target)


def test_targets_of_a_tensordict():
    """LeanRL's way, whose `lerp_` of all there is stops at bools: the masks are copied."""
    tensordict = pytest.importorskip("tensordict")
    policy, follower = make(), make(seed=1)
    params = tensordict.from_module(policy).detach()
    target = params.clone().lock_()
    target.to_module(follower)
    learn(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    before = follower[2].weight.detach().clone()
    with pytest.raises(NotImplementedError, match="not implemented for 'Bool'"):
        target.lerp_(params, 0.5)
    target.apply_(lambda t, p: t.lerp_(p, 0.5) if t.is_floating_point() else t.copy_(p), params)
    assert torch.equal(follower[2].mask, policy[2].mask)
    kept = policy[2].mask
    mean = (policy[2].weight + before) / 2
    torch.testing.assert_close(follower[2].weight[kept], mean[kept])
    x = draw()
    torch.testing.assert_close(follower(x), truth(follower)(x))


def test_optimisers_in_the_backward_pass():
    policy = make()
    optimizers = {p: torch.optim.Adam([p], lr=0.1) for p in policy.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in policy.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        policy(draw()).square().mean().backward()
    assert optimizers[policy[2].weight].state
    assert_zero(policy, *optimizers.values())


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimisers(name):
    schedulefree = pytest.importorskip("schedulefree")
    policy = make()
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizer = getattr(schedulefree, name)(policy.parameters(), **options)
    optimizer.train()
    learn(policy, optimizer)
    for mode in (optimizer.eval, optimizer.train):
        mode()
        assert_zero(policy, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("adam", [torch.optim.Adam, optim.Adam], ids=["torch's", "ours"])
def test_a_compiled_step_ends_its_graph_at_the_hook(adam):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    policy, plain = make(), make()
    optimizer = adam(policy.parameters(), lr=torch.tensor(0.1))
    expected = torch.optim.Adam(plain.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        x = draw()
        for module, owner in ((policy, optimizer), (plain, expected)):
            owner.zero_grad()
            module(x).square().mean().backward()
        step()
        expected.step()
        assert_zero(policy, optimizer)
    # Adam divides by the root of small gradients' squares; each step is 0.1.
    torch.testing.assert_close(
        list(policy.parameters()), list(plain.parameters()), rtol=1e-3, atol=1e-4
    )
    breaks = torch._dynamo.utils.counters["graph_break"]
    # Beside torch's own, two for the hook, which is not traced.
    assert sum(count for reason, count in breaks.items() if "disable" in reason) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("batch", [3, 256])
def test_compiled_autograd(batch):
    torch._dynamo.reset()
    for module in (make(), SparseLinear(17, 48).prune_(0.1), SparseLinear(17, 48).prune_(0.9)):
        x, parameters = draw(batch), list(module.parameters())
        expected = torch.autograd.grad(module(x).square().sum(), parameters)
        compiler = torch.compile(backend="eager")
        with torch._dynamo.compiled_autograd._enable(compiler):
            module(x).square().sum().backward()
        found = tuple(parameter.grad for parameter in parameters)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


NORMS = {
    "weight_norm, old": nn.utils.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", NORMS)
def test_a_recomputed_weight_is_masked_last(name):
    policy = make()
    layer = policy[2]
    mask = layer.mask.clone()
    NORMS[name](layer)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        policy(draw()).square().mean().backward()
        optimizer.step()
    policy.eval()
    for batch in (1, 8):
        with torch.no_grad():
            hidden = policy[1](policy[0](draw(batch)))
            output = layer(hidden)
            expected = F.linear(hidden, layer.weight * mask, layer.bias)
        torch.testing.assert_close(output, expected)
    assert torch.equal(layer.mask, mask)


def test_encoders_read_through_the_mask():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2
    )
    sparsify_(encoder.eval(), 0.3, exclude=["layers.0.self_attn", "layers.1.self_attn"])
    x, padding = torch.randn(3, 4, 16), torch.tensor([[0, 0, 0, 1]] * 3).bool()
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            before = encoder(x, **options)
            for layer in sparse_layers(encoder):
                layer.weight.data.masked_fill_(~layer.mask, 7.0)
            torch.testing.assert_close(encoder(x, **options), before)


def test_a_sparse_state_in_a_dense_model():
    """torch names the masks; dropping them, or a model of full masks, is the way."""
    state = make().state_dict()
    dense = truth(make(seed=1))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.mask"):
        dense.load_state_dict(state)
    assert dense.load_state_dict(state, strict=False).unexpected_keys[0] == "0.mask"
    sparsify_(dense, 1.0).load_state_dict(state)
    assert torch.equal(dense[2].mask, state["2.mask"])
    assert_zero(dense)


def test_a_dense_state_in_a_sparse_model_without_strictness():
    policy, dense = make(), truth(make(seed=1)).state_dict()
    assert policy.load_state_dict(dense, strict=False).missing_keys[0] == "0.mask"
    assert_zero(policy)
    densify_(policy).load_state_dict(dense)
    torch.testing.assert_close(policy[2].weight, dense["2.weight"])


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("foreach", [False, True])
def test_sharded_parameters(one_process, foreach):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    policy, mesh = make(), init_device_mesh("cpu", (1,))
    for module in (*sparse_layers(policy), policy):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.1, foreach=foreach)
    for density in (0.3, 0.1):
        policy[2].prune_(density)
        for _ in range(2):
            optimizer.zero_grad()
            policy(draw()).square().mean().backward()
            optimizer.step()
    for layer in sparse_layers(policy):
        state = optimizer.state[layer.weight]
        for tensor in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
            assert not tensor.full_tensor().detach()[~layer.mask].count_nonzero()
    assert policy[2].density == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="sparsify before sharding"):
        sparsify_(policy, 0.05)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_layers(dtype):
    torch.manual_seed(0)
    layer = SparseLinear(6, 4, dtype=dtype).prune_(0.5)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=0.1)
    x = torch.randn(3, 6, dtype=dtype)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).abs().sum().backward()
        optimizer.step()
    assert_zero(layer, optimizer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * layer.mask, layer.bias))


def test_float64_is_ranked_as_such_by_sparsify():
    layer = nn.Linear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64))
    assert sparsify_(nn.Sequential(layer), 0.5)[0].mask.tolist() == [[False, True]]


def script():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(make())


def map_over_parameters_alone():
    layers = [make(seed=seed)[2] for seed in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.randn(4, 64)
    torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,)))(parameters)


def under_fake_tensors(call: Callable[[], object]) -> Callable[[], None]:
    def run():
        with torch._subclasses.FakeTensorMode():
            call()

    return run


def load_all_but_one_mask():
    state = OrderedDict(make(seed=1).state_dict())
    del state["2.mask"]
    make().load_state_dict(state)


def keep_an_inference_tensor():
    layer = SparseLinear(4, 4)
    with torch.inference_mode():
        mask = torch.ones_like(layer.mask)
    layer.mask = mask


def sparsify_complex():
    sparsify_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)), 0.5)


META = {"device": "meta"}


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "torch.jit.script": (script, TypeError, "torch.jit.trace.*densify_"),
    "vmap of parameters": (map_over_parameters_alone, ValueError, "pass the buffers too"),
    "strict load of all but one mask": (
        load_all_but_one_mask,
        RuntimeError,
        r"2\.mask \(the state has none.*strict=False.*densify_",
    ),
    "a mask from inference mode": (keep_an_inference_tensor, ValueError, "set_mask_"),
    "complex weights in sparsify_": (sparsify_complex, ValueError, "layer '1'.*exclude"),
    "sparsify_ on meta": (
        lambda: sparsify_(nn.Sequential(nn.Linear(4, 4, **META)), 0.5),
        ValueError,
        "after to_empty and loading",
    ),
    "prune_ on meta": (
        lambda: SparseLinear(4, 4, **META).prune_(0.5),
        ValueError,
        "scores must hold data",
    ),
    "density on meta": (
        lambda: SparseLinear(4, 4, **META).density,
        ValueError,
        "mask must hold data",
    ),
    "prune_ of fake tensors": (
        under_fake_tensors(lambda: SparseLinear(4, 4).prune_(0.5)),
        ValueError,
        "got a FakeTensor",
    ),
    "sparsify_ of fake tensors": (
        under_fake_tensors(lambda: sparsify_(nn.Sequential(nn.Linear(4, 4)), 0.5)),
        ValueError,
        "got FakeTensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_way_out(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_members_may_share_a_mask_that_is_mapped():
    layer, x = make()[2], torch.randn(4, 64)
    parameters = {n: torch.stack([p, 2 * p]).detach() for n, p in layer.named_parameters()}
    buffers = {name: buffer.expand(2, *buffer.shape) for name, buffer in layer.named_buffers()}

    def call(parameters, buffers):
        return torch.func.functional_call(layer, (parameters, buffers), (x,))

    outputs = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([layer(x), 2 * layer(x)]))
