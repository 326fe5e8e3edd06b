"""One small sweep that several files test: its spec and its table."""

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import load_results

SPEC = Sweep(
    conditions=("mask/weights", "mask/permuted", "random/re-init"),
    controls=("own", "ticket"),
    seeds=2,
    levels=3,
    hidden=(8, 8),
    rewind_step=128,
    chunk=3,
    ppo=PPO(steps=512, horizon=32),
    bc=BC(experts=2, expert_gate=0.0),
    evaluation=Evaluation(points=2, episodes=3, final_episodes=4),
)
TIMES = ("wall_s", "train_s")


def table(out):
    return load_results(out).drop(TIMES)
