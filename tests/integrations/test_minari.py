"""Minari's data sets: written by policies, read as demonstrations, cloned by a sweep."""

import sys
from dataclasses import replace

import faults
import pytest
import torch

from sparse_tickets import Sweep, load_results, run_sweep
from sparse_tickets.algos.bc import BC
from sparse_tickets.envs import env_spec
from sparse_tickets.files import StoreError
from sparse_tickets.sweep.data import read_data
from sparse_tickets.sweep.experts import write_demonstrations
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.store import Store

SPEC = replace(faults.SPEC, algos=("bc",), rewind_step=0)
CLONES = replace(SPEC, bc=BC(dataset=("pole/good-v0", "pole/bad-v0")))


def test_without_minari_it_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    monkeypatch.delitem(sys.modules, "sparse_tickets.integrations.minari", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'sparse-tickets\[minari\]'"):
        run_sweep(CLONES, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sweep_of_experts_is_stored_and_hashed_as_before_there_were_data_sets():
    assert "dataset" not in SPEC.to_dict()["bc"]
    assert Sweep.from_dict(SPEC.to_dict()) == SPEC
    assert CLONES.to_dict()["bc"]["dataset"] == ["pole/good-v0", "pole/bad-v0"]
    assert Sweep.from_dict(CLONES.to_dict()) == CLONES
    assert total_steps(CLONES) < total_steps(SPEC)


@pytest.fixture
def home(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def create(name, env, lengths, seed=0):
    """A data set as others write them: gymnasium's own environment, random actions."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    env = gymnasium.make(env)
    env.action_space.seed(seed)
    episodes = []
    for number, length in enumerate(lengths):
        observations, actions, rewards, terminations = (
            [env.reset(seed=seed + number)[0]],
            [],
            [],
            [],
        )
        while len(actions) < length and not any(terminations):
            actions.append(env.action_space.sample())
            obs, reward, terminated, _, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(reward)
            terminations.append(terminated)
        truncations = [False] * (len(actions) - 1) + [not terminations[-1]]
        episode = EpisodeBuffer(
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
        )
        episodes.append(episode)
    made = minari.create_dataset_from_buffers(name, episodes, env=env, algorithm_name="random")
    env.close()
    return made


pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:minari", "ignore::UserWarning:gymnasium"
)


def test_discrete_actions_are_what_the_student_is_to_be_certain_of(home):
    from sparse_tickets.integrations.minari import read

    made = create("pole/good-v0", "CartPole-v1", [9, 8, 7])
    spec = env_spec("CartPole-v1")
    obs, target = read(["pole/good-v0"], spec)
    assert obs.shape == (1, made.total_steps, 4)
    assert target.shape == (1, made.total_steps, 2)
    episodes = list(made.iterate_episodes())
    seen = torch.cat([torch.from_numpy(each.observations[:-1]) for each in episodes])
    done = torch.cat([torch.from_numpy(each.actions) for each in episodes])
    scaled = (seen - torch.tensor(spec.offset)) / torch.tensor(spec.scale)
    torch.testing.assert_close(obs[0], scaled)
    assert target[0].argmax(1).equal(done)
    assert torch.equal(target.exp().sum(-1), torch.ones(1, made.total_steps))
    few, _ = read(["pole/good-v0", "pole/good-v0"], spec, steps=11)
    assert few.equal(obs[:, :11].expand(2, -1, -1))


def test_continuous_actions_are_means_of_no_spread(home):
    from sparse_tickets.integrations.minari import read

    made = create("swing/random-v0", "Pendulum-v1", [12])
    _, target = read(["swing/random-v0"], env_spec("Pendulum-v1"))
    (episode,) = made.iterate_episodes()
    assert target[0, :, :1].equal(torch.from_numpy(episode.actions))
    assert (target[0, :, 1:].exp() < 1e-4).all()


def test_a_sweep_clones_data_sets_and_needs_them_once(home):
    create("pole/good-v0", "CartPole-v1", [40] * 12)
    create("pole/bad-v0", "CartPole-v1", [40] * 12, seed=100)
    out = home / "run"
    run_sweep(CLONES, out)
    store = Store(out)
    assert read_data(store, "experts") is None
    demonstrations = read_data(store, "demonstrations")
    assert demonstrations["obs"].shape == (2, 128, 4)
    assert not demonstrations["obs"][0].equal(demonstrations["obs"][1])
    assert all("demonstrations" in store.inputs(unit) for unit in store.units())
    assert load_results(out)["return_final"].is_finite().all()
    # Seed 1 has the second: other data, other weights from the same mask and start.
    twice = replace(CLONES, bc=BC(dataset=("pole/good-v0", "pole/good-v0")))
    run_sweep(twice, home / "twice")
    first, second = (
        {t.seed: t.final for t in Store(place).read_tickets(store.units()[0])}
        for place in (out, home / "twice")
    )
    assert first[0].equal(second[0])
    assert not first[1].equal(second[1])


def test_what_does_not_fit_is_refused_before_anything_is_written(home):
    create("swing/random-v0", "Pendulum-v1", [5])
    for names, said in (
        (("pole/none-v0",), "data set on this machine, got 'pole/none-v0': minari download"),
        (("swing/random-v0",), "swing/random-v0 is of Pendulum-v1, not of CartPole-v1"),
    ):
        with pytest.raises(ValueError, match=said):
            run_sweep(replace(SPEC, bc=BC(dataset=names)), home / "run")
    assert not (home / "run").exists()


def test_a_runs_experts_write_what_their_students_were_shown(home):
    import minari

    from sparse_tickets.integrations.minari import read

    out = home / "run"
    run_sweep(SPEC, out)
    write_demonstrations(out, ["pole/expert-v0"])
    made = minari.load_dataset("pole/expert-v0")
    assert made.total_steps == 128
    assert made.env_spec.id == "CartPole-v1"
    shown = read_data(Store(out), "demonstrations")
    obs, _ = read(["pole/expert-v0"], env_spec("CartPole-v1"))
    # The data set goes copy by copy, the demonstrations step by step.
    steps = shown["obs"].view(8, 16, 4).transpose(0, 1).reshape(128, 4)
    torch.testing.assert_close(obs[0], steps, rtol=1e-5, atol=1e-5)
    ends = [each.terminations[-1] or each.truncations[-1] for each in made.iterate_episodes()]
    assert all(ends)
    for episode in made.iterate_episodes():
        assert len(episode.observations) == len(episode) + 1
        assert not (episode.terminations | episode.truncations)[:-1].any()
        assert (episode.rewards == 1).all()
    # Gymnasium's own physics leads from each observation to the next.
    env = made.recover_environment().unwrapped
    episode = made[0]
    env.reset()
    for before, action, after in zip(
        episode.observations, episode.actions, episode.observations[1:], strict=False
    ):
        env.state = tuple(map(float, before))
        env.steps_beyond_terminated = None
        found, *_ = env.step(int(action))
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(after))
    with pytest.raises(ValueError, match="one for each of 1 policies"):
        write_demonstrations(out, [])
    run_sweep(replace(SPEC, bc=BC(dataset=("pole/expert-v0",))), home / "again")
    with pytest.raises(StoreError, match="has no intact experts"):
        write_demonstrations(home / "again", ["pole/other-v0"])
