"""TorchRL's networks, losses with functional parameters, and target updaters on sparse layers."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchrl", reason="needs sparse-tickets[torchrl]")
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, HardUpdate, SACLoss, SoftUpdate

from sparse_tickets import SparseLinear, densify_, optim, sparsify_

OBSERVATION, ACTION, BATCH = 4, 2, 16
pytestmark = pytest.mark.filterwarnings(
    "ignore:No target network updater:UserWarning", "ignore::FutureWarning"
)


def mlp(inp, out, **options):
    return MLP(in_features=inp, out_features=out, num_cells=[32, 32], **options)


def build_actor():
    net = nn.Sequential(mlp(OBSERVATION, 2 * ACTION), NormalParamExtractor())
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True
    )


def build_critic():
    return ValueOperator(mlp(OBSERVATION, 1), in_keys=["observation"])


def build_q():
    # Several inputs, which TorchRL's MLP concatenates.
    return ValueOperator(mlp(OBSERVATION + ACTION, 1), in_keys=["observation", "action"])


def batch():
    done = torch.zeros(BATCH, 1, dtype=torch.bool)
    following = {"observation": torch.randn(BATCH, OBSERVATION), "reward": torch.randn(BATCH, 1)}
    data = {
        "observation": torch.randn(BATCH, OBSERVATION),
        "action": torch.rand(BATCH, ACTION) * 1.8 - 0.9,
        "action_log_prob": torch.randn(BATCH),
        "advantage": torch.randn(BATCH, 1),
        "value_target": torch.randn(BATCH, 1),
        "next": TensorDict({**following, "done": done, "terminated": done}, [BATCH]),
    }
    return TensorDict(data, [BATCH])


def total(loss, data):
    torch.manual_seed(1)  # losses sample actions
    return sum(value for key, value in loss(data).items() if key.startswith("loss"))


def sparse_layers(module):
    return [layer for layer in module.modules() if isinstance(layer, SparseLinear)]


def by_name(parameters):
    return dict(parameters.flatten_keys(".").items())


def masked(parameters):
    """Each mask of a loss's parameters with its weight."""
    named = by_name(parameters)
    return [
        (named[name.removesuffix("mask") + "weight"], mask)
        for name, mask in named.items()
        if name.endswith(".mask")
    ]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_an_mlp_is_built_of_sparse_layers():
    net = mlp(OBSERVATION, ACTION, layer_class=SparseLinear)
    assert len(sparse_layers(net)) == 3
    sparsify_(net, density=0.3)
    x = torch.randn(8, OBSERVATION)
    expected = densify_(copy.deepcopy(net))(x)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(x[:, :2], x[:, 2:]), expected)


@pytest.mark.parametrize("library", [torch.optim, optim], ids=["torch", "ours"])
def test_clip_ppo_loss_trains_the_kept_weights_alone(library):
    actor, critic = build_actor(), build_critic()
    sparsify_(nn.ModuleList([actor, critic]), density=0.3)
    loss = ClipPPOLoss(actor, critic)
    optimizer = library.AdamW(loss.parameters(), lr=0.01, weight_decay=0.1)
    layers = sparse_layers(actor) + sparse_layers(critic)
    assert len(layers) == 6
    data = batch()
    for _ in range(3):
        optimizer.zero_grad()
        total(loss, data).backward()
        for layer in layers:
            assert layer.weight.grad.any()
            assert not layer.weight.grad[~layer.mask].any()
        optimizer.step()
    for layer in layers:
        assert not layer.weight[~layer.mask].any()
        assert not any(
            value[~layer.mask].any()
            for value in optimizer.state[layer.weight].values()
            if value.shape == layer.weight.shape
        )


def test_a_loss_sees_its_actor_pruned_later():
    actor, critic = build_actor(), build_critic()
    sparsify_(nn.ModuleList([actor, critic]), density=0.5)
    loss, data = ClipPPOLoss(actor, critic), batch()
    before = total(loss, data)
    sparsify_(actor, density=0.1)
    dense = ClipPPOLoss(densify_(copy.deepcopy(actor)), densify_(copy.deepcopy(critic)))
    torch.testing.assert_close(total(loss, data), total(dense, data))
    assert not torch.equal(total(loss, data), before)
    for weight, mask in masked(loss.actor_network_params):
        assert not weight[~mask].any()


@pytest.mark.parametrize(
    "updater",
    [lambda loss: SoftUpdate(loss, tau=0.1), lambda loss: HardUpdate(loss)],
    ids=["soft", "hard"],
)
def test_sac_loss_and_its_targets_read_the_kept_weights_alone(updater):
    actor, q = build_actor(), build_q()
    sparsify_(nn.ModuleList([actor, q]), density=0.3)
    masks = [layer.mask.clone() for layer in sparse_layers(q)]
    loss = SACLoss(actor, q, num_qvalue_nets=2, target_entropy=-2.0)
    loss.make_value_estimator(gamma=0.99)
    update, data = updater(loss), batch()
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        total(loss, data).backward()
        for weight, mask in masked(loss.qvalue_network_params):
            assert weight.grad.any()
            assert not weight.grad[~mask].any()
        optimizer.step()
        update.step()
    value = total(loss, data)
    for parameters in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        for (weight, mask), expected in zip(masked(parameters), masks, strict=True):
            assert mask.shape == (2, *expected.shape)
            assert torch.equal(mask, expected.expand_as(mask))
            # Nothing reads what lies there.
            weight.data[~mask] = 7.0
    assert torch.equal(total(loss, data), value)
    for layer in sparse_layers(actor):
        assert not layer.weight[~layer.mask].any()
