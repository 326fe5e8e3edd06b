"""A vmapped population in JAX, masks multiplied in: one program for many agents, without sparsity.

Ours, in PureJaxRL's spirit (`jax_trainer`), started from the job's own weights and masks. XLA takes
its threads from the cores the process may run on, not from torch's count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sparse_tickets.kernels.arena import Net
from sparse_tickets.timing import Contender

from ..ppo_job import PPOJob
from . import Unavailable

NAME = "JAX PPO, vmap of w*mask"
REASON = "JAX is not installed: install sparse-tickets[peers]"

_ITERATIONS = 4
"""Per call: enough that the call itself costs nothing."""


def ppo(job: PPOJob) -> Contender:
    """Four iterations of every agent per call; times are per agent-step.

    Compiled before the clock starts; ``plan`` says how long that took. Its random numbers are its
    own, so no result of ours corresponds: `tests/test_peers.py` holds physics, advantages and the
    update to the float64 reference, and the training to learn.

    Raises:
        Unavailable: JAX is not installed, or the job is not CartPole on a CPU.
    """
    run, seconds, version = compiled(job, _ITERATIONS)
    steps = job.agent_steps * _ITERATIONS
    plan = f"jax {version}, compiled in {seconds:.1f} s"
    return Contender(NAME, run, None, units=steps, plan=plan)


def compiled(job: PPOJob, iterations: int) -> tuple[Callable[[], torch.Tensor], float, str]:
    """The population as a call that trains it on, seconds of compilation, and JAX's version.

    The call returns mean episode lengths ``[P, iterations]``, NaN where no episode ended.

    Raises:
        Unavailable: see `ppo`.
    """
    if job.env_name != "CartPole-v1" or torch.device(job.device).type != "cpu":
        raise Unavailable("this JAX trainer is for CartPole-v1 on the CPU only")
    try:
        import jax
    except ImportError as error:
        raise Unavailable(REASON) from error
    from . import jax_trainer

    def layers(net: Net) -> jax_trainer.Layers:
        return tuple(
            (jax.numpy.array(weight.mT.numpy()), jax.numpy.array(bias.numpy()))
            for weight, bias in net.layers(parameters.weight)
        )

    parameters, actor = job.population.parameters, job.arena.actor
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        masks = tuple(
            jax.numpy.array(actor.weight(parameters.mask, layer).mT.float().numpy())
            for layer in range(actor.depth)
        )
        start = jax.vmap(lambda params, seed: jax_trainer.agent(params, seed, job.settings.copies))
        params = (layers(actor), layers(job.arena.critic))
        now = start(params, jax.numpy.arange(job.tickets))
        program = jax.jit(jax.vmap(jax_trainer.train(job.settings, iterations)), donate_argnums=0)
        began = time.perf_counter()
        train = program.lower(now, masks).compile()
        seconds = time.perf_counter() - began

    def run() -> torch.Tensor:
        nonlocal now
        now, lengths = train(now, masks)
        return torch.from_numpy(jax.device_get(lengths).copy())

    return run, seconds, jax.__version__
