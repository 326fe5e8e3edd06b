"""Stable-Baselines3's models on sparse layers: built, trained, pruned, saved and loaded."""

import pickle
from operator import attrgetter

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("stable_baselines3", reason="needs sparse-tickets[sb3]")
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy

from sparse_tickets import SparseLinear, optim
from sparse_tickets import sparsify_ as sparsify_module_
from sparse_tickets.convert import SparsifyWarning
from sparse_tickets.integrations.sb3 import (
    GradualPruning,
    SparseActorCriticPolicy,
    SparseDQNPolicy,
    SparsePolicy,
    SparseSACPolicy,
    SparseTD3Policy,
    sparse_policy,
    sparsify_,
)
from sparse_tickets.linear import count_kept

OFF_POLICY = {"learning_starts": 20, "batch_size": 16, "buffer_size": 500}
MODELS = {
    PPO: ("CartPole-v1", SparseActorCriticPolicy, {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    A2C: ("CartPole-v1", SparseActorCriticPolicy, {}),
    DQN: ("CartPole-v1", SparseDQNPolicy, {**OFF_POLICY, "target_update_interval": 10}),
    SAC: ("Pendulum-v1", SparseSACPolicy, OFF_POLICY),
    TD3: ("Pendulum-v1", SparseTD3Policy, OFF_POLICY),
    DDPG: ("Pendulum-v1", SparseTD3Policy, OFF_POLICY),
}
algorithms = pytest.mark.parametrize("algorithm", list(MODELS))


def build(algorithm, policy="MlpPolicy", **policy_kwargs):
    env, _, options = MODELS[algorithm]
    policy_kwargs = {"net_arch": [24, 24], **policy_kwargs}
    return algorithm(policy, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **options)


def online_layers(model):
    """The sparse layers of what is trained, and of what follows, by their common name."""
    online, targets = {}, {}
    for name, layer in model.policy.named_modules():
        if isinstance(layer, SparseLinear):
            top, _, rest = name.partition(".")
            if top.endswith("_target"):
                targets[f"{top.removesuffix('_target')}.{rest}"] = layer
            else:
                online[name] = layer
    return online, targets


def check_masks(model, density):
    """Exactly as many weights as asked for, and targets like the networks that they follow."""
    online, targets = online_layers(model)
    total = sum(layer.mask.numel() for layer in online.values())
    assert sum(int(layer.mask.sum()) for layer in online.values()) == count_kept(density, total)
    for layer in [*online.values(), *targets.values()]:
        assert not layer.weight.data[~layer.mask].any()
    for name, layer in targets.items():
        assert torch.equal(layer.mask, online[name].mask)


def check_equal(model, other):
    first, second = model.policy.state_dict(), other.policy.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for a, b in zip(
        online_layers(model)[1].values(), online_layers(other)[1].values(), strict=True
    ):
        assert torch.equal(a.mask, b.mask)
    observations = np.stack([model.observation_space.sample() for _ in range(4)])
    a, _ = model.predict(observations, deterministic=True)
    b, _ = other.predict(observations, deterministic=True)
    np.testing.assert_array_equal(a, b)


@algorithms
def test_a_model_is_sparsified_trained_saved_and_loaded(algorithm, tmp_path):
    model = sparsify_(build(algorithm), 0.3)
    assert type(model.policy) is MODELS[algorithm][1]
    check_masks(model, 0.3)
    model.learn(60)
    check_masks(model, 0.3)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=gym.make(MODELS[algorithm][0]), device="cpu")
    check_equal(model, loaded)
    check_masks(loaded, 0.3)
    loaded.learn(40)
    check_masks(loaded, 0.3)


@algorithms
def test_a_sparse_policy_class_takes_the_place_of_the_dense_one(algorithm, tmp_path):
    model = build(algorithm, MODELS[algorithm][1], density=0.25)
    check_masks(model, 0.25)
    model.learn(40)
    model.save(tmp_path / "model")
    check_equal(model, algorithm.load(tmp_path / "model", device="cpu"))
    model.policy.save(tmp_path / "policy")
    policy = type(model.policy).load(tmp_path / "policy", device="cpu")
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, policy.state_dict()[name])


def optimizers(model):
    """The policy's optimisers by their names in what is saved."""
    names = model._get_torch_save_params()[0]
    return {n: attrgetter(n)(model) for n in names if n.endswith(".optimizer")}


@algorithms
def test_optimisers_and_parameters_stay_the_same(algorithm):
    model = build(algorithm)
    before = {name: id(value) for name, value in model.policy.named_parameters()}
    stepping = optimizers(model)
    kinds = {name: type(optimizer) for name, optimizer in stepping.items()}
    model.learn(40)
    states = {name: len(optimizer.state) for name, optimizer in stepping.items()}
    sparsify_(model, 0.5, fuse=False)
    assert {name: type(optimizer) for name, optimizer in optimizers(model).items()} == kinds
    sparsify_(model, 0.5)
    assert {name: id(value) for name, value in model.policy.named_parameters()} == before
    assert stepping
    for name, optimizer in optimizers(model).items():
        assert optimizer is stepping[name]
        assert len(optimizer.state) == states[name] > 0
        assert type(optimizer) is getattr(optim, kinds[name].__name__)
        assert all(plan.format == "fused" for plan in optimizer.plan())
    model.learn(40, reset_num_timesteps=False)


@algorithms
def test_optimisers_of_torchs_and_ours_load_each_others_files(algorithm, tmp_path):
    """With the state that they had, under either setting, and as the setting was."""
    for fuse in (True, False):
        model = sparsify_(build(algorithm), 0.3, fuse=fuse)
        model.learn(40)
        model.save(tmp_path / "model")
        loaded = algorithm.load(tmp_path / "model", env=model.env, device="cpu")
        other = build(algorithm, MODELS[algorithm][1], fuse=not fuse)
        other.set_parameters(str(tmp_path / "model"))
        for name, optimizer in optimizers(model).items():
            assert type(optimizers(loaded)[name]) is type(optimizer)
            assert type(optimizers(other)[name]) is not type(optimizer)
            for again in (optimizers(loaded)[name], optimizers(other)[name]):
                torch.testing.assert_close(again.state_dict(), optimizer.state_dict())
        other.learn(40)


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_learning_does_not_depend_on_whose_optimiser_steps(algorithm):
    ours, torchs = (sparsify_(build(algorithm), 0.5, fuse=fuse) for fuse in (True, False))
    for model in (ours, torchs):
        model.set_random_seed(1)
        model.learn(33)
    theirs = dict(torchs.policy.named_parameters())
    for name, value in ours.policy.named_parameters():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


@algorithms
def test_set_parameters_brings_the_masks(algorithm):
    model, other = sparsify_(build(algorithm), 0.2), build(algorithm, MODELS[algorithm][1])
    other.set_parameters(model.get_parameters())
    check_equal(model, other)
    check_masks(other, 0.2)


@algorithms
def test_a_strict_load_refuses_a_state_that_lost_a_mask(algorithm):
    model = sparsify_(build(algorithm), 0.3)
    parameters = model.get_parameters()
    whole = dict(parameters["policy"])
    lost = [key for key in whole if key.endswith(".mask")][-1]
    parameters["policy"] = {key: value for key, value in whole.items() if key != lost}
    with pytest.raises(RuntimeError, match=lost):
        model.set_parameters(parameters)
    model.set_parameters(parameters, exact_match=False)
    check_masks(model, 0.3)
    other = build(algorithm, MODELS[algorithm][1], density=0.3)
    dense = build(algorithm).get_parameters()
    with pytest.raises(RuntimeError, match="dense model"):
        other.set_parameters(dense)
    unpruned = build(algorithm, MODELS[algorithm][1])
    unpruned.set_parameters(dense)
    check_masks(unpruned, 1.0)


@pytest.mark.parametrize("algorithm", [DQN, SAC, TD3])
def test_targets_answer_right_while_pruned_in_training(algorithm):
    model = sparsify_(build(algorithm), 0.8)
    for density in (0.4, 0.1):
        model.learn(40, reset_num_timesteps=False)
        sparsify_(model, density)
        check_masks(model, density)
        model.learn(40, reset_num_timesteps=False)
        check_masks(model, density)
    for layer in online_layers(model)[1].values():
        for batch in (1, 8):
            x = torch.randn(batch, layer.in_features)
            expected = nn.functional.linear(x, layer.weight * layer.mask, layer.bias)
            torch.testing.assert_close(layer(x), expected)


def test_layers_can_stay_dense(tmp_path):
    model = sparsify_(build(PPO), 0.3, exclude=["action_net", "value_net"])
    assert type(model.policy.action_net) is nn.Linear
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    assert type(loaded.policy.value_net) is nn.Linear
    check_equal(model, loaded)


def test_a_network_can_stay_dense_with_its_target():
    model = sparsify_(build(SAC), 0.3, exclude="critic")
    assert not online_layers(model)[1]
    model.learn(30)


def test_a_file_of_a_policy_that_lost_its_class_loads_by_custom_objects(tmp_path):
    model = build(PPO)
    with pytest.warns(SparsifyWarning, match=r"integrations\.sb3\.sparsify_\(model, density\)"):
        sparsify_module_(model.policy, 0.3)
    model.save(tmp_path / "model")
    with pytest.raises(RuntimeError, match="mask"):
        PPO.load(tmp_path / "model", device="cpu")
    custom = {"policy_class": SparseActorCriticPolicy}
    check_equal(model, PPO.load(tmp_path / "model", device="cpu", custom_objects=custom))


@pytest.mark.filterwarnings("ignore::sparse_tickets.convert.SparsifyWarning")
def test_targets_follow_when_a_state_says_otherwise():
    """A policy sparsified layer by layer has targets with masks of their own."""
    model = build(DQN)
    sparsify_module_(model.policy.q_net, 0.3)
    sparsify_module_(model.policy.q_net_target, 0.1)
    state = model.policy.state_dict()
    other = build(DQN, SparseDQNPolicy)
    other.policy.load_state_dict(state)
    check_masks(other, 0.3)


def test_any_policy_class_has_its_sparse_one(tmp_path):
    class Mine(ActorCriticPolicy):
        pass

    sparse = sparse_policy(Mine)
    assert issubclass(sparse, SparsePolicy)
    assert issubclass(sparse, Mine)
    assert sparse_policy(Mine) is sparse
    assert sparse_policy(sparse) is sparse
    assert sparse_policy(ActorCriticPolicy) is SparseActorCriticPolicy
    model = build(PPO, sparse, density=0.5)
    model.save(tmp_path / "model")
    check_equal(model, PPO.load(tmp_path / "model", device="cpu"))
    with pytest.raises(TypeError, match="class of policies"):
        sparse_policy("MlpPolicy")


@pytest.mark.parametrize(("algorithm", "part"), [(DQN, "q_net"), (SAC, "actor"), (TD3, "actor")])
def test_an_actor_is_saved_and_loaded_alone(algorithm, part, tmp_path):
    policy = getattr(sparsify_(build(algorithm), 0.3).policy, part)
    policy.save(tmp_path / "part")
    loaded = type(policy).load(tmp_path / "part", device="cpu")
    for name, value in policy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    again = pickle.loads(pickle.dumps(policy))
    assert type(again) is type(policy)
    assert torch.equal(again.state_dict()[name], value)


def test_crossq_learns_beside_units_without_inputs(tmp_path):
    """Its batch renormalisation differentiates the root of a variance: of theirs, zero."""
    contrib = pytest.importorskip("sb3_contrib")
    options = {"learning_starts": 20, "batch_size": 16, "buffer_size": 500}
    policy_kwargs = {"net_arch": [24], "renorm_warmup_steps": 1}
    model = contrib.CrossQ(
        "MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, seed=0, device="cpu", **options
    )
    sparsify_(model, 0.3, scope="layer").save(tmp_path / "model")
    for learner in (model, contrib.CrossQ.load(tmp_path / "model", env=model.env)):
        for first in (learner.actor.latent_pi[1], learner.critic.q_networks[0][1]):
            assert not first.mask.any(1).all()
        learner.learn(60)
        assert all(p.isfinite().all() for p in learner.policy.parameters())


def answers(policy_class, policy, obs, actions):
    """What a policy class's own methods make of a policy, and the gradients."""
    policy.zero_grad()
    values, log_prob, entropy = policy_class.evaluate_actions(policy, obs, actions)
    (values.sum() + log_prob.sum() + (0 if entropy is None else entropy.sum())).backward()
    torch.manual_seed(0)
    return [
        *(values, log_prob, *policy_class.forward(policy, obs)),
        policy_class.predict_values(policy, obs),
        policy_class.get_distribution(policy, obs).mode(),
        *(p.grad for p in policy.parameters()),
    ]


@pytest.mark.filterwarnings("ignore::sparse_tickets.convert.SparsifyWarning")
@pytest.mark.parametrize(
    ("env", "options"),
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {}),
        ("Pendulum-v1", {"use_sde": True}),
        ("CartPole-v1", {"policy_kwargs": {"share_features_extractor": False}}),
        ("CartPole-v1", {"policy_kwargs": {"net_arch": []}}),
    ],
)
def test_actor_and_critic_in_one_call_each_answer_as_the_dense_class(env, options):
    model = sparsify_(PPO("MlpPolicy", env, seed=0, device="cpu", **options), 0.3)
    obs = torch.randn(9, *model.observation_space.shape)
    actions = torch.stack([torch.as_tensor(model.action_space.sample()) for _ in range(9)])
    for _ in range(2):
        ours, theirs = (
            answers(policy_class, model.policy, obs, actions)
            for policy_class in (SparseActorCriticPolicy, ActorCriticPolicy)
        )
        assert ("_chains" in model.policy.__dict__) is not options.get("use_sde", False)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        # As it is then, too: another head, and fewer weights.
        model.policy.value_net = nn.Linear(model.policy.value_net.in_features, 1)
        sparsify_(model, 0.1)


def test_a_hook_between_extractor_and_head_is_heard():
    policy, heard = sparsify_(build(PPO), 0.3).policy, []
    obs = torch.randn(3, 4)
    policy.mlp_extractor.register_forward_hook(lambda *_: heard.append("extractor"))
    policy.forward(obs)
    assert heard == ["extractor"]
    policy.mlp_extractor._forward_hooks.clear()
    policy.value_net.register_forward_hook(lambda *_: heard.append("head"))
    policy.predict_values(obs)
    assert heard == ["extractor", "head"]


def test_dict_observations():
    class Env(gym.Env):
        observation_space = gym.spaces.Dict(
            {"a": gym.spaces.Box(-1, 1, (3,)), "b": gym.spaces.Box(-1, 1, (2,))}
        )
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    policy = sparse_policy(MultiInputActorCriticPolicy)
    model = PPO(
        policy, Env(), policy_kwargs={"density": 0.5}, n_steps=16, batch_size=16, device="cpu"
    )
    model.learn(32)
    check_masks(model, 0.5)


@algorithms
def test_gradual_pruning_keeps_exactly_what_its_curve_says(algorithm):
    model, densities = build(algorithm), []
    prune = GradualPruning(density=0.1, start=0.2, stop=0.8, every=10)
    record = prune._prune

    def watch(progress):
        record(progress)
        densities.append(0.1 + 0.9 * (1 - progress) ** 3)
        check_masks(model, densities[-1])

    prune._prune = watch
    model.learn(160, callback=prune)
    assert len(densities) > 2
    assert densities == sorted(densities, reverse=True)
    check_masks(model, 0.1)


def test_gradual_pruning_goes_on_along_its_curve():
    model = build(A2C)
    model.learn(100, callback=GradualPruning(density=0.1, start=0.0, stop=1.0, every=1))
    model = build(A2C)
    half = GradualPruning(density=0.1, start=0.0, stop=1.0, every=1)
    model.num_timesteps = 50
    sparsify_(model, 0.1 + 0.9 / 8)
    model.learn(50, callback=half, reset_num_timesteps=False)
    assert half._initial == pytest.approx(1.0, rel=1e-2)
    check_masks(model, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density must be in"),
        ({"density": 0.1, "start": 0.9}, "start and stop"),
        ({"density": 0.1, "every": 0}, "every must be"),
    ],
)
def test_gradual_pruning_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(**options)


def test_sparsify_refuses_and_leaves_the_model_as_it_was():
    model = build(PPO)
    with pytest.raises(TypeError, match=r"sparse_tickets.sparsify_ takes modules"):
        sparsify_(model.policy, 0.1)
    with pytest.raises(ValueError, match="density"):
        sparsify_(model, 1.1)
    assert type(model.policy) is ActorCriticPolicy


def test_the_squashed_gaussian_draws_what_the_dense_one_draws():
    torch.manual_seed(0)
    dense, sparse = build(SAC), build(SAC)
    sparse.policy.load_state_dict(dense.policy.state_dict())
    sparsify_(sparse, 1.0)
    obs = torch.randn(7, 3)
    results = []
    for model in (dense, sparse):
        actor = model.actor
        torch.manual_seed(1)
        acted = actor(obs)
        best = actor(obs, deterministic=True)
        action, log_prob = actor.action_log_prob(obs)
        (action.sum() + log_prob.square().sum()).backward()
        gradients = [parameter.grad for parameter in actor.parameters()]
        spread = actor.action_dist.distribution.stddev
        inner = actor.action_dist.gaussian_actions
        results.append([acted, best, action, log_prob, spread, inner, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparse.actor.action_dist.nothing
    again = pickle.loads(pickle.dumps(sparse.policy))
    assert type(again.actor.action_dist) is type(sparse.actor.action_dist)


def test_a_mode_is_set_everywhere_and_heard_by_who_listens():
    class Listening(nn.Linear):
        heard = None

        def train(self, mode=True):
            self.heard = mode
            return super().train(mode)

    model = sparsify_(build(SAC), 0.5)
    policy = model.policy
    policy.actor.latent_pi.append(nn.Sequential(nn.Dropout(0.1), Listening(24, 24)))
    for mode in (False, True):
        policy.set_training_mode(mode)
        assert all(part.training is mode for part in policy.actor.modules())
        assert all(part.training is mode for part in policy.critic.modules())
        assert policy.actor.latent_pi[-1][1].heard is mode
    with pytest.raises(ValueError, match="mode must be a bool"):
        policy.train(1)
