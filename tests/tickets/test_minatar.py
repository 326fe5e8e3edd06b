"""MinAtar's games through the adapter: flat, zeros and ones as they are, with a limit."""

import sys

import pytest
import torch

from sparse_tickets.envs import env_spec, make_env, registry


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    registry._register_minatar.cache_clear()
    monkeypatch.setitem(sys.modules, "minatar", None)
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    with pytest.raises(ValueError, match=r"needs MinAtar: pip install 'sparse-tickets\[minatar\]'"):
        env_spec("MinAtar/Breakout-v1")
    registry._register_minatar.cache_clear()


def test_a_game_is_flat_and_its_inputs_are_zeros_and_ones():
    pytest.importorskip("minatar")
    spec = env_spec("MinAtar/Breakout-v1")
    assert (spec.observation_dim, spec.action_dim, spec.time_limit) == (400, 3, 5_000)
    assert set(spec.offset) == {0.0}
    assert set(spec.scale) == {1.0}
    assert 0 < spec.random_return < 2
    env = make_env("MinAtar/Breakout-v1", 2, 3)
    first = env.reset(torch.tensor([4, 5]))
    assert first.shape == (2, 3, 400)
    seen = [first]
    for step in range(40):
        action = torch.full((2, 3), step % 3)
        seen.append(env.step(action).obs)
    assert set(torch.stack(seen).unique().tolist()) == {0.0, 1.0}
    again = [env.reset(torch.tensor([4, 5]))]
    again += [env.step(torch.full((2, 3), step % 3)).obs for step in range(40)]
    assert torch.equal(torch.stack(seen), torch.stack(again))
    env.close()
