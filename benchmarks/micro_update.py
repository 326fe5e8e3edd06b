"""CPU time of one PPO iteration's update per ticket and sample, by density, on one thread.

    python benchmarks/micro_update.py --width 64 --tickets 20

Prints a line per density: milliseconds per ticket, nanoseconds per sample and visit (actor and
critic, forward, backward and Adam), and the plan. CPU time, best of `repeats`: other processes on
the machine disturb it less than wall time.
"""

from __future__ import annotations

import argparse
import time

import torch

from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.ppo import Batch, PPOConfig, plan, ppo_update_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--observation", type=int, default=4)
    parser.add_argument("--actions", type=int, default=2)
    parser.add_argument("--tickets", type=int, default=20)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = (arguments.observation, arguments.width, arguments.width)
    arena = Arena.build((*hidden, arguments.actions), (*hidden, 1))
    tickets, samples = arguments.tickets, arguments.samples
    batch = Batch(
        torch.randn(tickets, samples, arguments.observation),
        torch.randint(0, arguments.actions, (tickets, samples)),
        -torch.rand(tickets, samples),
        *(torch.randn(tickets, samples) for _ in range(3)),
    )
    config, lr = PPOConfig(), torch.full((tickets,), 2.5e-4)
    for density in (1.0, 0.64, 0.512, 0.41, 0.33, 0.21, 0.107, 0.028):
        mask = torch.rand(tickets, arena.prunable) < density
        weight = 0.1 * torch.randn(tickets, arena.size)
        weight[:, : arena.prunable] *= mask
        parameters = Parameters(
            weight,
            mask,
            torch.zeros_like(weight),
            torch.zeros_like(weight),
            torch.zeros_like(lr).long(),
        )
        best = float("inf")
        for iteration in range(arguments.repeats + 1):
            begin = time.process_time()
            ppo_update_(
                parameters,
                arena,
                batch,
                torch.arange(tickets),
                iteration,
                lr,
                config,
                density=density,
            )
            # The first call may compile.
            if iteration:
                best = min(best, time.process_time() - begin)
        visits = tickets * samples * config.epochs
        formats = plan(arena, weight.device, density=density).format
        print(
            f"density {density:.3f}  {1e3 * best / tickets:6.2f} ms/ticket  "
            f"{1e9 * best / visits:6.0f} ns/sample  {formats}"
        )


if __name__ == "__main__":
    main()
