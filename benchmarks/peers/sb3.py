"""Stable-Baselines3's PPO on gymnasium's CartPole: one agent on one core, as users run it."""

from __future__ import annotations

from sparse_tickets.algos.ppo import PPO as Settings
from sparse_tickets.timing import Contender, pinned_threads

from . import Unavailable

NAME = "SB3 PPO (1 agent, 1 core)"


def ppo(settings: Settings, env_name: str) -> Contender:
    """One iteration per call; times are per agent-step. Its numbers are its own: not verified.

    Torch gets one thread, which is fastest at this size: one such process per core adds up.

    Raises:
        Unavailable: stable-baselines3 is not installed.
    """
    try:
        from stable_baselines3 import PPO, __version__
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError as error:
        raise Unavailable(
            "stable-baselines3 is not installed: install sparse-tickets[peers]"
        ) from error
    model = PPO(
        "MlpPolicy",
        make_vec_env(env_name, n_envs=settings.copies),
        learning_rate=settings.learning_rate,
        n_steps=settings.horizon,
        batch_size=settings.batch // settings.minibatches,
        n_epochs=settings.epochs,
        gamma=settings.gamma,
        gae_lambda=settings.lam,
        clip_range=settings.clip,
        clip_range_vf=settings.clip if settings.clip_value else None,
        ent_coef=settings.entropy_coef,
        vf_coef=settings.value_coef,
        max_grad_norm=settings.max_norm,
        device="cpu",
        seed=0,
    )

    def run() -> None:
        with pinned_threads(1):
            model.learn(settings.batch, reset_num_timesteps=False)

    return Contender(NAME, run, None, units=settings.batch, plan=f"stable-baselines3 {__version__}")
