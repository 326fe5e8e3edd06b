"""PPO on CartPole in JAX, one agent as pure functions: `vmap` makes a population of it.

Written for this comparison in PureJaxRL's style: environment, policy and update are one compiled
program. Equations and hyper-parameters are those of `sparse_tickets.algos.ppo`, truncation
included; sparsity is a mask multiplied into the actor's weights.

What helps JAX is done: noise is drawn once per rollout, values come from one batched call after it,
and no gradient is computed for anything but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sparse_tickets.algos.ppo import PPO

Layers = tuple[tuple[Array, Array], ...]
"""Per layer the weight ``[I, O]`` and the bias ``[O]``."""
Params = tuple[Layers, Layers]
"""Actor and critic."""

TIME_LIMIT = 500


class TrainState(NamedTuple):
    """Everything that changes: weights, Adam's moments and count, environments, randomness."""

    params: Params
    m: Params
    v: Params
    count: Array
    state: Array
    age: Array
    key: Array


class Samples(NamedTuple):
    """What the loss needs of each step, ``[n, ...]``."""

    obs: Array
    action: Array
    logp: Array
    value: Array
    advantage: Array
    target: Array


def step(state: Array, action: Array) -> tuple[Array, Array]:
    """Gymnasium's CartPole: states ``[E, 4]`` and actions ``[E]`` to the next, and who fell."""
    x, x_dot, theta, theta_dot = jnp.moveaxis(state, -1, 0)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    force = jnp.where(action == 1, 10.0, -10.0)
    push = (force + 0.05 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
    x_acc = push - 0.05 * theta_acc * cos / 1.1
    x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acc
    theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc
    fallen = (jnp.abs(x) > 2.4) | (jnp.abs(theta) > 12 * 2 * math.pi / 360)
    return jnp.stack((x, x_dot, theta, theta_dot), -1), fallen


def network(layers: Layers, x: Array) -> Array:
    """Tanh between layers."""
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def masked(layers: Layers, masks: tuple[Array, ...]) -> Layers:
    """The layers with their pruned weights at zero; autograd masks the gradient likewise."""
    return tuple((weight * mask, bias) for (weight, bias), mask in zip(layers, masks, strict=True))


def advantages(
    value: Array, next_value: Array, terminated: Array, done: Array, settings: PPO
) -> Array:
    """Generalised advantage estimation over ``[T, E]``; every step's reward is 1."""
    delta = 1.0 + settings.gamma * jnp.where(terminated, 0.0, next_value) - value
    decay = settings.gamma * settings.lam * (1.0 - done)

    def back(following: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        advantage = now[0] + now[1] * following
        return advantage, advantage

    return lax.scan(back, jnp.zeros_like(value[0]), (delta, decay), reverse=True)[1]


def loss(params: Params, masks: tuple[Array, ...], batch: Samples, settings: PPO) -> Array:
    """CleanRL's clipped objective of one agent."""
    actor, critic = params
    logits = jax.nn.log_softmax(network(masked(actor, masks), batch.obs))
    logp = jnp.take_along_axis(logits, batch.action[:, None], 1)[:, 0]
    entropy = -(jnp.exp(logits) * logits).sum(1).mean()
    ratio = jnp.exp(logp - batch.logp)
    advantage = batch.advantage - batch.advantage.mean()
    advantage = advantage / (batch.advantage.std(ddof=1) + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    policy_loss = jnp.maximum(-advantage * ratio, -advantage * clipped_ratio).mean()

    value = network(critic, batch.obs)[:, 0]
    square = (value - batch.target) ** 2
    if settings.clip_value:
        clipped = batch.value + jnp.clip(value - batch.value, -settings.clip, settings.clip)
        square = jnp.maximum(square, (clipped - batch.target) ** 2)
    value_loss = 0.5 * square.mean()
    return policy_loss - settings.entropy_coef * entropy + settings.value_coef * value_loss


def agent(params: Params, seed: Array, copies: int) -> TrainState:
    """One agent with weights ``params`` before its first step."""
    key, first = jax.random.split(jax.random.key(seed))
    zeros = jax.tree.map(jnp.zeros_like, params)
    return TrainState(
        params,
        zeros,
        zeros,
        jnp.zeros((), jnp.int32),
        jax.random.uniform(first, (copies, 4), minval=-0.05, maxval=0.05),
        jnp.zeros(copies, jnp.int32),
        key,
    )


def train(
    settings: PPO, iterations: int
) -> Callable[[TrainState, tuple[Array, ...]], tuple[TrainState, Array]]:
    """A function of an agent and its actor's masks, to be vmapped and compiled.

    It returns the agent ``iterations`` later and, per iteration, the mean length of the episodes
    that ended in it (NaN if none did).
    """

    def iteration(now: TrainState, masks: tuple[Array, ...]) -> tuple[TrainState, Array]:
        now, batch, length = _rollout(now, masks, settings)
        return _update(now, masks, batch, settings), length

    def run(start: TrainState, masks: tuple[Array, ...]) -> tuple[TrainState, Array]:
        return lax.scan(lambda now, _: iteration(now, masks), start, length=iterations)

    return run


def _rollout(
    now: TrainState, masks: tuple[Array, ...], settings: PPO
) -> tuple[TrainState, Samples, Array]:
    actor, critic = masked(now.params[0], masks), now.params[1]
    key, for_actions, for_resets = jax.random.split(now.key, 3)
    shape = (settings.horizon, settings.copies)
    noise = jax.random.gumbel(for_actions, (*shape, 2))
    fresh = jax.random.uniform(for_resets, (*shape, 4), minval=-0.05, maxval=0.05)

    def act(carry: tuple[Array, Array], drawn: tuple[Array, Array]):
        (obs, age), (gumbel, reset) = carry, drawn
        logits = jax.nn.log_softmax(network(actor, obs))
        action = jnp.argmax(logits + gumbel, -1)
        logp = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        after, terminated = step(obs, action)
        age = age + 1
        done = terminated | (age >= TIME_LIMIT)
        carry = jnp.where(done[:, None], reset, after), jnp.where(done, 0, age)
        return carry, (obs, action, logp, after, terminated, done, age)

    (state, age), steps = lax.scan(act, (now.state, now.age), (noise, fresh))
    obs, action, logp, after, terminated, done, ages = steps
    value, next_value = network(critic, jnp.stack((obs, after)))[..., 0]
    advantage = advantages(value, next_value, terminated, done, settings)
    length = (ages * done).sum() / done.sum()
    samples = Samples(obs, action, logp, value, advantage, advantage + value)
    flat = jax.tree.map(lambda field: field.reshape(-1, *field.shape[2:]), samples)
    return now._replace(state=state, age=age, key=key), flat, length


def _update(now: TrainState, masks: tuple[Array, ...], batch: Samples, settings: PPO) -> TrainState:
    key, shuffle = jax.random.split(now.key)
    orders = jax.vmap(lambda one: jax.random.permutation(one, settings.batch))(
        jax.random.split(shuffle, settings.epochs)
    )
    orders = orders.reshape(settings.epochs * settings.minibatches, -1)

    def minibatch(now: TrainState, order: Array) -> tuple[TrainState, None]:
        picked = jax.tree.map(lambda field: field[order], batch)
        grad = jax.grad(loss)(now.params, masks, picked, settings)
        return adam(now, grad, settings), None

    return lax.scan(minibatch, now._replace(key=key), orders)[0]


def adam(now: TrainState, grad: Params, settings: PPO) -> TrainState:
    """Adam on the gradient clipped by this agent's own norm; constants as in `PPOConfig`."""
    config = settings.config()
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad)))
    scale = jnp.minimum(settings.max_norm / (norm + 1e-6), 1.0)
    count = now.count + 1
    size = settings.learning_rate / (1 - config.beta1**count)
    root = jnp.sqrt(1 - config.beta2**count)
    m = jax.tree.map(lambda m, g: config.beta1 * m + (1 - config.beta1) * scale * g, now.m, grad)
    v = jax.tree.map(
        lambda v, g: config.beta2 * v + (1 - config.beta2) * (scale * g) ** 2, now.v, grad
    )
    params = jax.tree.map(
        lambda p, m, v: p - size * m / (jnp.sqrt(v) / root + config.eps), now.params, m, v
    )
    return now._replace(params=params, m=m, v=v, count=count)
