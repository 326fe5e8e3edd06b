"""Stable-Baselines3 on sparse layers: models, policies, targets, pruning while they learn.

Two ways in, one result. `sparsify_` takes a model that exists; a sparse policy class is passed
where its dense one would be::

    model = sparsify_(PPO("MlpPolicy", "CartPole-v1"), density=0.1)
    model = PPO(SparseActorCriticPolicy, "CartPole-v1", policy_kwargs={"density": 0.1})

Either way ``save``, ``load`` and ``set_parameters`` work as before, for every algorithm
of stable-baselines3 and sb3-contrib, and a target network has its online network's masks. The
policy's optimisers step in one pass, as those of `sparse_tickets.optim`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparse_tickets import convert, optim
from sparse_tickets.casting import make_sparse_
from sparse_tickets.integrations.modules import detach_constants, is_batch_renorm, set_mode
from sparse_tickets.linear import SparseLinear
from sparse_tickets.sequential import Chain
from sparse_tickets.targets import tie_masks_

try:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.distributions import (
        DiagGaussianDistribution,
        Distribution,
        StateDependentNoiseDistribution,
    )
    from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
    from stable_baselines3.common.torch_layers import MlpExtractor
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy
    from stable_baselines3.td3.policies import TD3Policy
except ImportError as error:
    raise ImportError(
        "sparse_tickets.integrations.sb3 needs stable-baselines3: pip install 'sparse-tickets[sb3]'"
    ) from error

from sparse_tickets.integrations.squashed import fuse_distribution_

__all__ = [
    "GradualPruning",
    "SparseActorCriticPolicy",
    "SparseDQNPolicy",
    "SparsePolicy",
    "SparseSACPolicy",
    "SparseTD3Policy",
    "sparse_policy",
    "sparsify_",
]

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SparsePolicy(BaseModel):
    """What a policy class inherits first to become sparse; `sparse_policy` makes such a class.

    A state brings its masks along: the layers that it has masks for become sparse as it is
    loaded. Masks of target networks are in no state, because they are the online networks'.

    Args:
        density: fraction of the weights to keep, as in `sparse_tickets.sparsify_`; targets are
            not counted. 1 makes the layers sparse with nothing pruned, for a callback to prune.
        scope: as in `sparse_tickets.sparsify_`, with its default.
        exclude: names, as in ``named_modules()``, of layers or modules that stay dense.
        fuse: make optimisers of torch's those of `sparse_tickets.optim`, by `optim.fuse_`.
    """

    # For a policy whose class became sparse after it was built.
    _exclude: tuple[str, ...] = ()
    _fuse = True

    def __init__(
        self,
        *args: Any,
        density: float = 1.0,
        scope: str | None = None,
        exclude: Iterable[str] = (),
        fuse: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sparsify_(density, scope, exclude, fuse)

    def _sparsify_(
        self, density: float, scope: str | None, exclude: Iterable[str], fuse: bool
    ) -> None:
        """Prune the online networks together, then the targets like them."""
        self._fuse = fuse
        self._exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        targets = [name for name, _, target in self._targets() if _has(target, nn.Linear)]
        options: dict[str, Any] = {} if scope is None else {"scope": scope}
        convert.sparsify_(self, density, exclude=(*self._exclude, *targets), **options)
        for name, part in self.named_modules():
            if is_batch_renorm(part) and detach_constants not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(detach_constants)
            # An actor or a critic is a policy too, to be saved and loaded alone.
            if isinstance(part, BaseModel) and part is not self and _has(part, SparseLinear):
                policy: Any = part
                policy.__class__ = sparse_policy(type(part))
                inner = [other for other in self._exclude if other.startswith(f"{name}.")]
                policy._exclude = tuple(other.removeprefix(f"{name}.") for other in inner)
                policy._fuse = fuse
            optimizer = getattr(part, "optimizer", None)
            if fuse and isinstance(optimizer, torch.optim.Optimizer):
                optim.fuse_(optimizer)
            fuse_distribution_(getattr(part, "action_dist", None))
        self._tie_targets_()

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``, for a tenth of its time: algorithms call it at every update."""
        if not isinstance(mode, bool):
            raise ValueError(f"mode must be a bool, got {mode!r}")
        set_mode(self, mode)
        return self

    def _targets(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Name of each target network, the network it follows, and the target."""
        for name, target in self._modules.items():
            online = self._modules.get(name.removesuffix("_target"))
            if target is not None and online is not None and online is not target:
                yield name, online, target

    def _tie_targets_(self) -> None:
        for _, online, target in self._targets():
            if _has(online, SparseLinear):
                tie_masks_(target, online)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moved to another device, masks are copies: tie them again."""
        super()._apply(fn, recurse)
        self._tie_targets_()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without the masks of targets."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in self._target_masks(prefix):
            del state[key]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """A state with the masks of all layers that are sparse, or of none: a dense policy's.

        Raises:
            RuntimeError: under ``strict``, some masks are missing, or the masks present would prune
                weights of a dense policy's state.
        """
        sparse = {f"{name}.mask" for name, part in self.named_modules() if _is_sparse(part)}
        masks = sparse - set(self._target_masks(""))
        missing = sorted(masks - state_dict.keys())
        if strict and missing and len(missing) < len(masks):
            raise RuntimeError(
                f"state_dict must hold the mask of every sparse layer or, for a dense policy's "
                f"state, of none; missing are {missing}: load it with strict=False "
                "(exact_match=False) to keep the masks there are"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Become sparse where the state is; children, which load after this, find all they need."""
        for name, layer in self.named_modules():
            mask = state_dict.get(f"{prefix}{name}.mask")
            if type(layer) is nn.Linear and isinstance(mask, Tensor):
                make_sparse_(layer)
        self._tie_targets_()
        for key, online in self._target_masks(prefix).items():
            state_dict.pop(key, None)
            if online in state_dict:
                state_dict[key] = state_dict[online]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _target_masks(self, prefix: str) -> dict[str, str]:
        """Keys of the targets' masks, and of the masks that they are."""
        return {
            f"{prefix}{name}.{layer}.mask": f"{prefix}{name.removesuffix('_target')}.{layer}.mask"
            for name, _, target in self._targets()
            for layer, module in target.named_modules()
            if _is_sparse(module)
        }

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"exclude": self._exclude, "fuse": self._fuse}
        return {**super()._get_constructor_parameters(), **own}


class SparseActorCriticPolicy(SparsePolicy, ActorCriticPolicy):
    """Sparse MlpPolicy of PPO, A2C and TRPO; arguments of `SparsePolicy` and of the dense class.

    The actor's layers and its head are one call, and so are the critic's.
    """

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values and log-probabilities, as the dense class."""
        if not self._is_plain():
            return super().forward(obs, deterministic)
        for_actor, for_critic = self._features(obs)
        values = self._values(for_critic)
        distribution = self._distribution(for_actor)
        actions = distribution.get_actions(deterministic=deterministic)
        shaped = actions.reshape(-1, *cast(Any, self.action_space.shape))
        return shaped, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropy, as the dense class."""
        if not self._is_plain():
            return super().evaluate_actions(obs, actions)
        for_actor, for_critic = self._features(obs)
        distribution = self._distribution(for_actor)
        values = self._values(for_critic)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> Distribution:
        """The distribution of actions, as the dense class."""
        if not self._is_plain():
            return super().get_distribution(obs)
        features = BaseModel.extract_features(self, obs, self.pi_features_extractor)
        return self._distribution(features)

    def predict_values(self, obs: Any) -> Tensor:
        """Values, as the dense class."""
        if not self._is_plain():
            return super().predict_values(obs)
        return self._values(BaseModel.extract_features(self, obs, self.vf_features_extractor))

    def _is_plain(self) -> bool:
        """Whether nobody sees or needs what the extractor hands to the heads."""
        extractor = cast(Any, self._modules.get("mlp_extractor"))
        by_latent = type(self)._get_action_dist_from_latent
        return (
            type(extractor) is MlpExtractor
            and by_latent is ActorCriticPolicy._get_action_dist_from_latent
            and not isinstance(self.action_dist, StateDependentNoiseDistribution)
            and "forward" not in extractor.__dict__
            and not any(getattr(extractor, name) for name in _HOOKS)
        )

    def _features(self, obs: Any) -> tuple[Tensor, Tensor]:
        """Of the actor and of the critic, which may share them."""
        found = self.extract_features(obs)
        return cast(Any, (found, found) if self.share_features_extractor else found)

    def _distribution(self, features: Tensor) -> Distribution:
        found = self._chain("policy_net", "action_net")(features)
        if isinstance(self.action_dist, DiagGaussianDistribution):
            return self.action_dist.proba_distribution(found, self.log_std)
        return cast(Any, self.action_dist).proba_distribution(found)

    def _values(self, features: Tensor) -> Tensor:
        return cast(Tensor, self._chain("value_net", "value_net")(features))

    def _chain(self, net: str, head: str) -> Chain:
        """A network of the extractor and its head, as they are now."""
        modules = cast(Any, self._modules["mlp_extractor"])._modules[net], self._modules[head]
        chains = self.__dict__.setdefault("_chains", {})
        chain = chains.get(head)
        if chain is None or chain.modules != modules:
            chain = chains[head] = Chain(*cast(Any, modules))
        return cast(Chain, chain)


class SparseDQNPolicy(SparsePolicy, DQNPolicy):
    """Sparse MlpPolicy of DQN; arguments of `SparsePolicy` and of the dense class."""


class SparseSACPolicy(SparsePolicy, SACPolicy):
    """Sparse MlpPolicy of SAC; arguments of `SparsePolicy` and of the dense class."""


class SparseTD3Policy(SparsePolicy, TD3Policy):
    """Sparse MlpPolicy of TD3 and DDPG; arguments of `SparsePolicy` and of the dense class."""


_NAMED = (SparseActorCriticPolicy, SparseDQNPolicy, SparseSACPolicy, SparseTD3Policy)

_made: dict[Any, type[SparsePolicy]] = {}


def sparse_policy(policy_class: type[BaseModel]) -> type[SparsePolicy]:
    """The sparse class of any policy class: for images, of sb3-contrib, your own.

    Args:
        policy_class: a class of policies; one that is sparse already is returned as it is.

    Raises:
        TypeError: it is no class of policies (``"MlpPolicy"`` is a name: pass the class).

    Example:
        >>> sparse_policy(ActorCriticPolicy)
        <class 'sparse_tickets.integrations.sb3.SparseActorCriticPolicy'>
    """
    if not (isinstance(policy_class, type) and issubclass(policy_class, BaseModel)):
        raise TypeError(f"policy_class must be a class of policies, got {policy_class!r}")
    if issubclass(policy_class, SparsePolicy):
        return policy_class
    for named in _NAMED:
        if named.__bases__[1] is policy_class:
            return named
    if policy_class not in _made:
        name = f"Sparse{policy_class.__name__}"
        _made[policy_class] = type(name, (SparsePolicy, policy_class), {"__reduce__": _reduce})
    return _made[policy_class]


def _reduce(policy: SparsePolicy) -> tuple[Any, ...]:
    """For pickle, which finds no class that is made on demand in any module."""
    policy_class = type(policy)
    if policy_class.__dict__.get("__reduce__") is not _reduce:
        return cast(tuple[Any, ...], object.__reduce_ex__(policy, 2))
    return _revive, policy_class.__bases__[1:], policy.__getstate__()


def _revive(policy_class: type[BaseModel]) -> SparsePolicy:
    sparse = sparse_policy(policy_class)
    return sparse.__new__(sparse)


def sparsify_(
    model: Algorithm,
    density: float,
    scope: str | None = None,
    exclude: Iterable[str] = (),
    fuse: bool = True,
) -> Algorithm:
    """Make the policy of a model sparse in place, or a sparse one sparser, targets included.

    Its policy becomes an instance of its class's `sparse_policy`, so that what the model saves can
    be loaded. Parameters and optimisers stay the same objects, with their state.

    Args:
        model: any algorithm of stable-baselines3 or sb3-contrib, before or during training.
        density: fraction of the online networks' weights to keep, in [0, 1].
        scope: how the density is shared among layers, as in `sparse_tickets.sparsify_`.
        exclude: names, as in ``model.policy.named_modules()``, of what stays dense.
        fuse: make optimisers of torch's those of `sparse_tickets.optim`, by `optim.fuse_`.

    Returns:
        The model.

    Raises:
        TypeError: it is no algorithm; a policy alone goes to `sparse_tickets.sparsify_`.
        ValueError: the density, scope or a name is invalid, as in `sparse_tickets.sparsify_`.

    Example:
        >>> from stable_baselines3 import DQN
        >>> model = sparsify_(DQN("MlpPolicy", "CartPole-v1"), density=0.1)
        >>> model.policy.q_net_target.q_net[2].mask is model.policy.q_net.q_net[2].mask
        True
    """
    if not isinstance(model, BaseAlgorithm):
        raise TypeError(
            f"model must be an algorithm of stable-baselines3, got {type(model).__name__} "
            "(sparse_tickets.sparsify_ takes modules)"
        )
    policy = cast(Any, model.policy)
    dense_class = type(policy)
    policy.__class__ = sparse_policy(dense_class)
    try:
        policy._sparsify_(density, scope, exclude, fuse)
    except BaseException:
        policy.__class__ = dense_class
        raise
    entropy = getattr(model, "ent_coef_optimizer", None)
    if fuse and entropy is not None:
        optim.fuse_(entropy)
    model.policy_class = type(policy)
    # For whoever loads what the model saves.
    for name, value in (("exclude", policy._exclude), ("fuse", fuse)):
        if name in model.policy_kwargs or value != getattr(SparsePolicy, f"_{name}"):
            model.policy_kwargs = {**model.policy_kwargs, name: value}
    return model


class GradualPruning(BaseCallback):
    """Prune a model while it learns, from its density to a final one, along a cubic curve.

    Between ``start`` and ``stop`` the density is ``d = final + (initial - final) (1 - u)^3``, u
    from 0 to 1 (Zhu and Gupta 2017): most is pruned early, when most is redundant. Of N weights
    exactly ``floor(d * N + 0.5)`` are kept. Pruning happens before a rollout, so that experience
    is learned from by the network that collected it. A dense model is made sparse first; a run
    that is continued goes on along its curve.

    Args:
        density: the final one, in [0, 1].
        start: fraction of the training's timesteps at which pruning starts.
        stop: fraction at which the final density is reached.
        every: timesteps between two prunings, at least.
        scope: as in `sparsify_`.
        exclude: as in `sparsify_`.
        fuse: as in `sparsify_`.
        verbose: 1 prints each pruning.

    Raises:
        ValueError: not ``0 <= start <= stop <= 1``, ``every`` below 1, or an invalid density.
    """

    def __init__(
        self,
        density: float,
        start: float = 0.2,
        stop: float = 0.8,
        every: int = 1000,
        scope: str | None = None,
        exclude: Iterable[str] = (),
        fuse: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1], got {density}")
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start and stop must be 0 <= start <= stop <= 1, got {start}, {stop}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.density, self.start, self.stop, self.every = density, start, stop, every
        self.scope, self.exclude, self.fuse = scope, exclude, fuse

    def _progress(self) -> float:
        """How far pruning should be, from 0 to 1."""
        done = self.model.num_timesteps / self.locals["total_timesteps"]
        if done >= self.stop:
            return 1.0
        return max(done - self.start, 0.0) / (self.stop - self.start)

    def _on_training_start(self) -> None:
        sparsify_(self.model, 1.0, self.scope, self.exclude, self.fuse)
        kept, progress = _density(cast(SparsePolicy, self.model.policy)), self._progress()
        # The density from which the curve comes through here.
        self._initial = kept
        if 0 < progress < 1:
            self._initial = min(self.density + (kept - self.density) / (1 - progress) ** 3, 1.0)
        self._next = 0

    def _on_rollout_start(self) -> None:
        progress = self._progress()
        if progress and self.model.num_timesteps >= self._next:
            self._prune(progress)

    def _on_training_end(self) -> None:
        """A last time, for a training whose last rollout began before ``stop``."""
        if self._progress():
            self._prune(self._progress())

    def _prune(self, progress: float) -> None:
        density = self.density + (self._initial - self.density) * (1 - progress) ** 3
        sparsify_(self.model, density, self.scope, self.exclude, self.fuse)
        self._next = self.model.num_timesteps + self.every
        self.logger.record("train/density", density)
        if self.verbose:
            print(f"{self.model.num_timesteps} timesteps: pruned to a density of {density:.4f}")

    def _on_step(self) -> bool:
        return True


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, SparseLinear)


def _has(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


def _density(policy: SparsePolicy) -> float:
    """What the online networks keep of the weights that can be pruned."""
    followers = {layer for _, _, target in policy._targets() for layer in target.modules()}
    masks = [
        layer.mask
        for layer in policy.modules()
        if isinstance(layer, SparseLinear) and layer not in followers
    ]
    return sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)
