"""Worker processes: the same to the last bit, errors by name, and nobody left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets import Sweep, run_sweep
from sparse_tickets.envs import GymEnv, env_spec, gym_spec, use_workers
from sparse_tickets.envs.workers import _crew, workers_for
from sparse_tickets.kernels.random import Stream, uniform
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.sweep import engines
from sparse_tickets.sweep.plugins import load_source, place_of


class Walk(gymnasium.Env):
    """Random steps, pushed; ends early or by its time limit. Subclasses have a flaw each."""

    observation_space = gymnasium.spaces.Box(-50, 50, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.normal(size=2), 0
        return self.place.astype(np.float32), {}

    def step(self, action):
        self.time += 1
        self.place = self.place + action + self.np_random.normal(size=2)
        observation = self.place.astype(np.float32)
        return observation, float(self.place[0]), self.place[1] > 3, self.time == 9, {}


class Broken(Walk):
    def step(self, action):
        if self.time == 1:
            raise KeyError(f"no way from {action.shape}")
        return super().step(action)


class Slow(Walk):
    def step(self, action):
        time.sleep(60)


@pytest.fixture(scope="module", autouse=True)
def _kept():
    """Workers start once for all tests that do not end them, which share nothing after them."""
    gc.collect()
    others = set(_crew._shared)
    with use_workers(2):
        yield
        gc.collect()
    assert not _crew._shared - others
    assert others or not _crew._workers


def keys(count):
    return torch.arange(count) * 7919 - 11


def act(env, step):
    size = env.copies * (1 if env.spec.discrete else env.spec.action_dim)
    u = uniform(keys(env.tickets), size, stream=Stream.ACTION, step=step)
    if env.spec.discrete:
        return (u * env.spec.action_dim).long()
    return u.view(env.tickets, env.copies, -1) * 2 - 1


def played(make, workers, tickets=3, copies=3):
    """All that an environment returns, some copies resting at the end."""
    env = GymEnv(make, tickets, copies, workers=workers)
    found = [env.reset(keys(tickets))]
    for step in range(60):
        if step == 50:
            env.rest(torch.arange(tickets * copies).view(tickets, copies) % 2 == 0)
        found += env.step(act(env, step))
    found.append(env.reset(keys(tickets)))
    env.close()
    return found


def ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("make", [Walk, "CartPole-v1", "FrozenLake-v1"])
def test_workers_change_no_bit(make):
    alone = played(make, 1)
    assert sum(int(ends.sum()) for ends in alone[3:-1:5]) > 5
    for workers in (None, 5):
        for one, other in zip(alone, played(make, workers), strict=True):
            assert torch.equal(one, other)


def test_an_error_says_what_it_is_and_where():
    env = GymEnv(Broken, 2, 2)
    env.reset(keys(2))
    env.step(act(env, 0))
    with pytest.raises(KeyError, match=r"no way from \(2,\)") as raised:
        env.step(act(env, 1))
    first, told = raised.value.__notes__
    assert first == "at a step of Broken (ticket 0, copy 0)"
    assert "in a worker process" in told
    assert f'{__file__}", line' in told
    # The others have stopped too: it can begin again.
    env.reset(keys(2))
    env.step(act(env, 0))
    with pytest.raises(KeyError, match="no way"):
        env.step(act(env, 1))
    env.close()
    with pytest.raises(RuntimeError, match="reset must be called before step"):
        env.step(act(env, 1))


def test_a_plugins_environment_is_known_and_its_place_told(tmp_path):
    place = str(tmp_path / "mine.py")
    source = (
        "import gymnasium\n"
        "class Mine(gymnasium.Env):\n"
        "    observation_space = action_space = gymnasium.spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        raise OSError('no such place')\n"
    )
    load_source(place, source.encode())
    mine = sys.modules[place].Mine
    env = GymEnv(mine, 1, 2, spec=gym_spec(mine, "Mine", pilot_steps=0))
    with pytest.raises(OSError, match="no such place") as raised:
        env.reset(keys(1))
    assert place_of(raised.value, {place}) == f"{place}, line 5"
    del sys.modules[place]


def test_sweeps_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(engines.local, "run", lambda *_, **__: workers_for(None, 64, by_id=False))
    assert run_sweep(Sweep(seeds=1), tmp_path, workers=3) == 3
    with pytest.raises(ValueError, match="workers must be left out with engine='ray', got 3"):
        run_sweep(Sweep(seeds=1), tmp_path, workers=3, engine="ray")


def test_torchs_idle_threads_leave_their_cores_to_the_workers():
    def tasks():
        return len(os.listdir("/proc/self/task"))

    before = torch.get_num_threads()
    env = GymEnv(Walk, 1, 2)
    env.reset(keys(1))
    torch.set_num_threads(2)
    alone = tasks()
    x = torch.randn(1 << 20)
    doubled = x * 2
    assert tasks() > alone
    env.step(act(env, 0))
    deadline = time.monotonic() + 10
    while tasks() > alone:  # one that was joined may still be listed
        assert time.monotonic() < deadline
    assert torch.equal(x * 2, doubled)
    # Nor does acting wake any, as torch's softmax of a few numbers would.
    env.step(act(env, 0))
    arena = policy_arena(env_spec("CartPole-v1"))
    population = Population.create(arena, initialise(arena, keys(4)))
    cart = GymEnv("CartPole-v1", 4, 2)
    obs = cart.reset(keys(4))
    alone = tasks()
    rollout(population.parameters, arena, cart, obs, keys(4), 3)
    assert tasks() == alone
    assert torch.get_num_threads() == 2
    cart.close()
    torch.set_num_threads(before)
    env.close()


def test_what_cannot_be_sent_says_so():
    lock = threading.Lock()

    def make():
        with lock:
            return Walk()

    with pytest.raises(ValueError, match=r"workers must be 1 for Walk, which cannot be sent"):
        GymEnv(make, 1, 2)
    GymEnv(make, 1, 2, workers=1).close()


@pytest.mark.long
def test_a_worker_that_dies_is_told_of_and_replaced():
    env = GymEnv(Walk, 1, 4)
    env.reset(keys(1))
    pids = [worker.process.pid for worker in _crew._workers]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a worker process of Walk ended with status -9"):
        env.step(act(env, 0))
    assert all(map(ended, pids))
    with pytest.raises(RuntimeError, match=r"Walk cannot go on: its worker processes were stopped"):
        env.step(act(env, 0))
    env.close()
    assert len(played(Walk, 2)) == 302


@pytest.mark.long
def test_an_interrupt_ends_the_workers():
    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    env = GymEnv(Slow, 1, 2)
    env.reset(keys(1))
    pids = [worker.process.pid for worker in _crew._workers]
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        env.step(act(env, 0))
    signal.signal(signal.SIGALRM, before)
    assert all(map(ended, pids))


@pytest.mark.long
def test_a_fork_has_workers_of_its_own():
    others = set(_crew._shared)
    env = GymEnv(Walk, 1, 2)
    env.reset(keys(1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            env.step(act(env, 0))
        except RuntimeError as error:
            code = 0 if "fork" in str(error) else 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    env.step(act(env, 0))
    del env
    gc.collect()
    assert _crew._shared <= others


@pytest.mark.long
def test_workers_end_with_a_process_however_it_ends(tmp_path):
    """Also: a script needs no ``if __name__ == '__main__'``, and its workers are small."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, gymnasium\n"
        "from sparse_tickets.envs import GymEnv, gym_spec\n"
        "from sparse_tickets.envs.workers import _crew\n"
        "class Mine(gymnasium.Env):\n"
        "    observation_space = action_space = gymnasium.spaces.Discrete(2)\n"
        "spec = gym_spec(Mine, 'Mine', pilot_steps=0)\n"
        "envs = [GymEnv(Mine, 1, 2, spec=spec, workers=2) for _ in range(2)]\n"
        "pids = [worker.process.pid for worker in _crew._workers]\n"
        "assert not any('torch' in open(f'/proc/{pid}/maps').read() for pid in pids)\n"
        "print(*pids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (-signal.SIGTERM, "")
    pids = run.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while not all(map(ended, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_how_many(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert workers_for(None, 64, by_id=False) == 2
    assert workers_for(3, 64, by_id=False) == 3
    assert workers_for(3, 2, by_id=True) == 2
    with use_workers(None):
        assert [workers_for(None, copies, by_id=True) for copies in (1, 9, 64)] == [1, 2, 4]
        assert workers_for(None, 64, by_id=False) == 1
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"), use_workers(0):
        pass
    with pytest.raises(ValueError, match="workers must be at least 1, got -1"):
        GymEnv(Walk, 1, 1, workers=-1)
