"""Which weights should `sparsify_` keep when a fresh policy is to be trained sparse?

PPO, DQN and SAC of Stable-Baselines3 and a PPO of CleanRL's architecture train from scratch, dense
and under masks drawn by the magnitude of the initial weights, which share a density out over the
layers in different ways. Each run keeps ``floor(density * N + 0.5)`` weights of the policy:

- ``global``: all magnitudes in one ranking;
- ``global, live head``: the same, but every row of an output layer keeps its largest weights, as
  many as the density gives it;
- ``relative``: one ranking of magnitudes over their layer's root mean square;
- ``lamp``: one ranking by LAMP's score (Lee et al. 2021), scale-free and larger in small layers;
- ``layer``: every layer keeps the same share;
- ``erk``: Erdos-Renyi-Kernel shares (Evci et al. 2020), denser in small layers.

Five seeds of what decides: dense, ``erk``, ``layer`` and ``global`` at every density; two of the
other shares, which PPO alone was tried under. Each cell of the table says its seeds.

Resumable, one row a run; writes ``results/sparsify_default.parquet`` and ``.md``. Needs
Stable-Baselines3::

    python experiments/sparsify_default.py                  # every run, hours on one core
    python experiments/sparsify_default.py --minutes 60     # as many as start in that time
    python experiments/sparsify_default.py --quick          # seconds: does it run?
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import polars as pl
import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor, nn

from sparse_tickets import SparseLinear, sparsify_
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.prune import erk_counts

HERE = Path(__file__).parent
TABLE = HERE / "results" / "sparsify_default.parquet"
EPISODES = 20


# How a density is shared out. Each takes the weights of a policy, layer by layer, which of them
# belong to output layers, and how many to keep in all; and gives the masks.


def by_score(scores: list[Tensor], k: int) -> list[Tensor]:
    """The k largest scores of all layers together; ties keep the earlier."""
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:k]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def by_count(weights: list[Tensor], counts: list[int]) -> list[Tensor]:
    return [by_score([w.abs()], count)[0] for w, count in zip(weights, counts, strict=True)]


def global_(weights: list[Tensor], heads: list[bool], k: int) -> list[Tensor]:
    return by_score([w.abs() for w in weights], k)


def live_head(weights: list[Tensor], heads: list[bool], k: int) -> list[Tensor]:
    density = k / sum(w.numel() for w in weights)
    scores = []
    for w, head in zip(weights, heads, strict=True):
        score = w.abs().clone()
        if head:
            first = score.topk(max(1, round(density * w.shape[1])), dim=1).indices
            score.scatter_(1, first, torch.inf)
        scores.append(score)
    return by_score(scores, k)


def relative(weights: list[Tensor], heads: list[bool], k: int) -> list[Tensor]:
    return by_score([w.abs() / w.square().mean().sqrt() for w in weights], k)


def lamp(weights: list[Tensor], heads: list[bool], k: int) -> list[Tensor]:
    scores = []
    for w in weights:
        square, order = w.double().square().flatten().sort(descending=True, stable=True)
        scores.append(torch.empty_like(square).scatter(0, order, square / square.cumsum(0)))
    return by_score([s.view_as(w) for s, w in zip(scores, weights, strict=True)], k)


def layer(weights: list[Tensor], heads: list[bool], k: int) -> list[Tensor]:
    density = k / sum(w.numel() for w in weights)
    return by_count(weights, [int(density * w.numel() + 0.5) for w in weights])


def erk(weights: list[Tensor], heads: list[bool], k: int) -> list[Tensor]:
    return by_count(weights, erk_counts([(0, *w.shape) for w in weights], k))


SHARES: dict[str, Callable[[list[Tensor], list[bool], int], list[Tensor]]] = {
    "global": global_,
    "global, live head": live_head,
    "relative": relative,
    "lamp": lamp,
    "layer": layer,
    "erk": erk,
}


def prune(network: nn.Module, share: str, density: float) -> list[tuple[str, float]]:
    """Make a fresh network sparse in place; returns what each layer keeps."""
    if share == "dense":
        return []
    sparsify_(network, density=1.0)
    named = {n: m for n, m in network.named_modules() if isinstance(m, SparseLinear)}
    weights = [m.weight.detach() for m in named.values()]
    inputs = [w.shape[1] for w in weights]
    heads = [w.shape[0] not in inputs[i + 1 :] for i, w in enumerate(weights)]
    k = int(density * sum(w.numel() for w in weights) + 0.5)
    for sparse, mask in zip(named.values(), SHARES[share](weights, heads, k), strict=True):
        sparse.set_mask_(mask)
    return [(name, sparse.density) for name, sparse in named.items()]


# What is trained. Each gives the returns of its training episodes in order, and a policy's mean
# return over fresh episodes.


class Outcome(NamedTuple):
    episodes: list[float]
    final: float
    kept: list[tuple[str, float]]


def follow(online: nn.Module, target: nn.Module) -> None:
    """A target network starts as its online network, zeros included, and is updated from it."""
    with torch.no_grad():
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.copy_(new)


def learn(model: BaseAlgorithm, steps: int, kept: list[tuple[str, float]]) -> Outcome:
    model.ep_info_buffer = None
    model._stats_window_size = 100_000
    model.learn(steps)
    trained: Any = model
    env = make_vec_env(trained.env.envs[0].spec.id, 1, seed=10_000)
    returns, _ = evaluate_policy(model, env, EPISODES, return_episode_rewards=True)
    episodes = [info["r"] for info in trained.ep_info_buffer]
    return Outcome(episodes, float(np.mean(returns)), kept)


def sb3_ppo(share: str, density: float, seed: int, steps: int) -> Outcome:
    env = make_vec_env("CartPole-v1", 8, seed=seed)
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        seed=seed,
        device="cpu",
    )
    return learn(model, steps, prune(model.policy, share, density))


def sb3_dqn(share: str, density: float, seed: int, steps: int) -> Outcome:
    model = DQN(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 1, seed=seed),
        learning_rate=2.3e-3,
        batch_size=64,
        buffer_size=100_000,
        learning_starts=1000,
        gamma=0.99,
        target_update_interval=10,
        train_freq=256,
        gradient_steps=128,
        exploration_fraction=0.16,
        exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]},
        seed=seed,
        device="cpu",
    )
    kept = prune(model.q_net, share, density)
    follow(model.q_net, model.q_net_target)
    return learn(model, steps, kept)


def sb3_sac(share: str, density: float, seed: int, steps: int) -> Outcome:
    env = make_vec_env("Pendulum-v1", 1, seed=seed)
    model = SAC(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        policy_kwargs={"net_arch": [128, 128]},
        seed=seed,
        device="cpu",
    )
    both = nn.ModuleDict({"actor": model.actor, "critic": model.critic})
    kept = prune(both, share, density)
    follow(model.critic, model.critic_target)
    return learn(model, steps, kept)


class Agent(nn.Module):
    """CleanRL's: two networks 64-64 with tanh, orthogonal initialisation, actor head 0.01."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.critic = self.network(observations, 1, 1.0)
        self.actor = self.network(observations, actions, 0.01)

    @staticmethod
    def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
        layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
        for linear, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
            nn.init.orthogonal_(linear.weight, scale)
            nn.init.zeros_(linear.bias)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def cleanrl_ppo(share: str, density: float, seed: int, steps: int) -> Outcome:
    """CleanRL's ``ppo.py`` with its defaults: 4 environments x 128 steps, 4 epochs of 4 batches."""
    envs, length, epochs, batches = 4, 128, 4, 4
    gamma, lam, clip, entropy_share, value_share, lr = 0.99, 0.95, 0.2, 0.01, 0.5, 2.5e-4
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    env = gym.make_vec("CartPole-v1", envs, vectorization_mode="vector_entry_point")
    agent = Agent(4, 2)
    kept = prune(agent, share, density)
    optimizer = torch.optim.Adam(agent.parameters(), lr=lr, eps=1e-5)
    observation = torch.from_numpy(env.reset(seed=seed)[0])
    done, running, episodes = torch.zeros(envs), np.zeros(envs), []
    iterations = max(1, steps // (envs * length))
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
        obs = torch.empty(length, envs, 4)
        action, logp, value, reward, ended = torch.empty(5, length, envs)
        with torch.no_grad():
            for t in range(length):
                policy = torch.distributions.Categorical(logits=agent.actor(observation))
                choice = policy.sample()
                obs[t], ended[t], action[t] = observation, done, choice
                logp[t], value[t] = policy.log_prob(choice), agent.critic(observation)[:, 0]
                seen, gained, terminated, truncated, _ = env.step(choice.numpy())
                observation, reward[t] = torch.from_numpy(seen), torch.from_numpy(gained)
                over = terminated | truncated
                done = torch.from_numpy(over).float()
                running += gained
                episodes += running[over].tolist()
                running[over] = 0
            advantage, last = torch.zeros(length, envs), torch.zeros(envs)
            following, alive = agent.critic(observation)[:, 0], 1 - done
            for t in reversed(range(length)):
                delta = reward[t] + gamma * following * alive - value[t]
                last = advantage[t] = delta + gamma * lam * alive * last
                following, alive = value[t], 1 - ended[t]
            target = advantage + value
        flat = [x.flatten(0, 1) for x in (obs, action, logp, advantage, target, value)]
        for _ in range(epochs):
            for part in np.split(random.permutation(envs * length), batches):
                o, a, old, adv, goal, before = (x[part] for x in flat)
                policy = torch.distributions.Categorical(logits=agent.actor(o))
                ratio = (policy.log_prob(a) - old).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                surrogate = torch.max(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))
                new = agent.critic(o)[:, 0]
                near = before + (new - before).clamp(-clip, clip)
                error = torch.max((new - goal).square(), (near - goal).square())
                entropy = policy.entropy().mean()
                loss = surrogate.mean() - entropy_share * entropy
                loss = loss + value_share * 0.5 * error.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    return Outcome(episodes, play(agent), kept)


@torch.no_grad()
def play(agent: Agent) -> float:
    """Mean greedy return of one episode in each of fresh environments."""
    env = gym.make_vec("CartPole-v1", EPISODES, vectorization_mode="vector_entry_point")
    observation = env.reset(seed=10_000)[0]
    total, alive = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while alive.any():
        action = agent.actor(torch.from_numpy(observation)).argmax(1)
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        total += reward * alive
        alive &= ~(terminated | truncated)
    return float(total.mean())


# The grid, run in the order of what decides first, and kept row by row.


class System(NamedTuple):
    train: Callable[[str, float, int, int], Outcome]
    steps: int
    shares: tuple[str, ...]


FEW = ("global", "layer", "erk")
SYSTEMS = {
    "CleanRL PPO, CartPole": System(cleanrl_ppo, 50_000, tuple(SHARES)),
    "SB3 PPO, CartPole": System(sb3_ppo, 50_000, tuple(SHARES)),
    "SB3 DQN, CartPole": System(sb3_dqn, 50_000, FEW),
    "SB3 SAC, Pendulum": System(sb3_sac, 4_000, FEW),
}
DENSITIES = (0.1, 0.05, 0.2, 0.5)
SEEDS = 5


@dataclass(frozen=True)
class Trial:
    system: str
    share: str
    density: float
    seed: int


def grid() -> Iterator[Trial]:
    """Program by program what decides, then two seeds of the other shares."""
    for name in SYSTEMS:
        for seed in range(SEEDS):
            yield Trial(name, "dense", 1.0, seed)
            yield from _cells(name, seed, FEW)
    for seed in range(2):
        for name, system in SYSTEMS.items():
            yield from _cells(name, seed, tuple(s for s in system.shares if s not in FEW))


def _cells(name: str, seed: int, shares: tuple[str, ...]) -> Iterator[Trial]:
    for density in DENSITIES:
        for share in shares:
            yield Trial(name, share, density, seed)


def execute(trial: Trial, steps: int) -> pl.DataFrame:
    started = time.perf_counter()
    outcome = SYSTEMS[trial.system].train(trial.share, trial.density, trial.seed, steps)
    last = outcome.episodes[-max(1, len(outcome.episodes) // 5) :]
    row = {
        **asdict(trial),
        "steps": steps,
        "return_final": outcome.final,
        "return_last_fifth": float(np.mean(last)),
        "episodes": len(outcome.episodes),
        "kept": ", ".join(f"{name} {share:.3f}" for name, share in outcome.kept),
        "seconds": time.perf_counter() - started,
    }
    return pl.DataFrame([row])


def markdown(frame: pl.DataFrame) -> str:
    """Mean greedy return after training, a table for each system; seeds in brackets."""
    lines = [
        "# How `sparsify_` should share a density out over the layers",
        "",
        "Mean return of the trained policy over 20 greedy episodes (SAC: deterministic), averaged",
        "over the seeds in brackets; in italics the mean over training's last fifth of episodes.",
        "Fresh networks, pruned by magnitude before training. Bold: the best of the three scopes",
        "of `sparsify_`. Written by `sparsify_default.py`; where fewer than five seeds ran, gaps",
        "of a hundred points may be noise.",
    ]
    for system, (_, steps, shares) in SYSTEMS.items():
        part = frame.filter(pl.col("system") == system)
        if part.is_empty():
            continue
        lines += ["", f"## {system}, {steps:,} steps", ""]
        densities = sorted(DENSITIES, reverse=True)
        lines += ["| share | " + " | ".join(f"density {d}" for d in densities) + " |"]
        lines += ["| --- |" + " ---: |" * len(densities)]
        best = [find_best(part.filter(pl.col("density") == density)) for density in densities]
        for share in ("dense", *shares):
            rows = part.filter(pl.col("share") == share)
            cells = [
                cell(rows if share == "dense" else rows.filter(pl.col("density") == density))
                for density in densities
            ]
            cells = [f"**{c}**" if share == b else c for c, b in zip(cells, best, strict=True)]
            lines.append(f"| {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def find_best(rows: pl.DataFrame) -> str | None:
    """The scope of `sparsify_` with the largest mean return."""
    means = rows.filter(pl.col("share").is_in(FEW)).group_by("share", maintain_order=True)
    ranked = means.agg(pl.col("return_final").mean()).sort("return_final")
    return ranked["share"][-1] if len(ranked) else None


def cell(rows: pl.DataFrame) -> str:
    if rows.is_empty():
        return "-"
    final, last = rows["return_final"].mean(), rows["return_last_fifth"].mean()
    return f"{final:.0f} ({len(rows)}), _{last:.0f}_"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--quick", action="store_true", help="one tiny run of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        for system in SYSTEMS:
            for share in ("dense", *SHARES):
                print(execute(Trial(system, share, 0.1, 0), 512).row(0), flush=True)
        return
    TABLE.parent.mkdir(exist_ok=True)
    frame = pl.read_parquet(TABLE) if TABLE.exists() else pl.DataFrame()
    done = (
        {Trial(*row) for row in frame.select("system", "share", "density", "seed").rows()}
        if len(frame)
        else set()
    )
    deadline = time.monotonic() + 60 * options.minutes
    for trial in grid():
        if trial in done:
            continue
        if time.monotonic() > deadline:
            break
        row = execute(trial, SYSTEMS[trial.system].steps)
        print(row.drop("kept").row(0), flush=True)
        frame = pl.concat([frame, row])
        write_parquet(TABLE, frame)
        TABLE.with_suffix(".md").write_text(markdown(frame))
    print(markdown(frame))


if __name__ == "__main__":
    main()
