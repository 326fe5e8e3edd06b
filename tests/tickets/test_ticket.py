"""Tickets: export to plain torch, the file format, and files that were damaged."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_tickets.files import StoreError
from sparse_tickets.kernels.activations import ACTIVATIONS
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.ticket import (
    ROWS,
    Normalise,
    ResidualBlock,
    Ticket,
    dump_tickets,
    load_tickets,
    save_tickets,
)

ARENAS = {
    "actor": Arena.build((4, 7, 2)),
    "critic": Arena.build((3, 5, 5, 2), (3, 6, 1), activation="relu"),
    "continuous": Arena.build((3, 5, 1), (3, 5, 1), continuous=True),
    "pruned critic": Arena.build((3, 5, 2), (3, 5, 1), prune_critic=True),
    "layernorm": Arena.build((3, 5, 4, 2), activation="layernorm-relu"),
    "residual": Arena.build((3, 5, 8, 5, 2), (3, 5, 1), activation="silu", architecture="residual"),
    "one weight": Arena.build((1, 1)),
}


def make(arena, *, density=0.4, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(arena.prunable, generator=generator) < density
    rows = {name: torch.randn(arena.size, generator=generator) for name in ROWS}
    for name in ("final", "best"):
        rows[name][: arena.prunable][~mask] = 0
    origin = {
        "env": "CartPole-v1",
        "algo": "ppo",
        "seed": seed,
        "condition": "mask/weights",
        "controls": "own",
        "level": 4,
    }
    return Ticket.of(arena, mask=mask, **rows, **{**origin, **fields})


def assert_same(one, other):
    for name in ("mask", *ROWS):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    tensors = ("mask", *ROWS)
    plain = [{k: v for k, v in vars(t).items() if k not in tensors} for t in (one, other)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("arena", ARENAS.values(), ids=ARENAS)
def test_layout_is_the_arenas(arena):
    assert make(arena).arena == arena


@pytest.mark.parametrize("arena", ARENAS.values(), ids=ARENAS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_save_and_load(arena, density, tmp_path):
    ticket = make(arena, density=density, metadata={"steps": 5, "curve": [1.5, float("inf")]})
    ticket.save(tmp_path / "ticket.safetensors")
    assert_same(ticket, Ticket.load(tmp_path / "ticket.safetensors"))
    assert [file.name for file in tmp_path.iterdir()] == ["ticket.safetensors"]


def test_a_population_in_one_file(tmp_path):
    arena = ARENAS["critic"]
    tickets = [make(arena, density=0.1 * seed, seed=seed) for seed in range(8)]
    save_tickets(tmp_path / "unit.safetensors", tickets)
    for one, other in zip(tickets, load_tickets(tmp_path / "unit.safetensors"), strict=True):
        assert_same(one, other)
    with pytest.raises(StoreError, match="holds 8 tickets"):
        Ticket.load(tmp_path / "unit.safetensors")


def test_only_the_support_is_stored():
    arena = Arena.build((4, 64, 64, 2))
    sparse, dense = (len(dump_tickets([make(arena, density=d)])) for d in (0.0, 1.0))
    # Four rows of float32; header and packed mask are the same size up to the shapes' digits.
    assert abs(dense - sparse - 4 * 4 * arena.prunable) < 64


def test_same_tickets_same_bytes():
    tickets = [make(ARENAS["critic"], seed=seed) for seed in range(3)]
    assert dump_tickets(tickets) == dump_tickets(tickets)


def test_rows_are_copied_and_restricted_to_the_support():
    arena = ARENAS["critic"]
    ticket = make(arena)
    pruned = ~ticket.mask
    initial = torch.ones(arena.size)
    copy = Ticket.of(
        arena,
        **{name: getattr(ticket, name) for name in ("mask", "rewind", "final", "best")},
        **{n: getattr(ticket, n) for n in ("env", "algo", "seed", "condition", "controls")},
        level=0,
        initial=initial,
    )
    initial.zero_()
    assert copy.initial[: arena.prunable][pruned].count_nonzero() == 0
    assert copy.initial[: arena.prunable][~pruned].eq(1).all()
    assert copy.initial[arena.prunable :].eq(1).all()


@pytest.mark.parametrize("name", ["continuous", "critic", "layernorm", "residual", "one weight"])
@pytest.mark.parametrize("which", ROWS)
def test_to_sequential_computes_the_actor(name, which):
    arena = ARENAS[name]
    ticket = make(arena)
    x = torch.randn(9, arena.actor.sizes[0])
    layers = [
        partial(functional.linear, weight=weight[0], bias=bias[0])
        for weight, bias in arena.actor.layers(getattr(ticket, which)[None])
    ]
    if name == "residual":
        stem, first, second, head = layers
        h = stem(x)
        h = h + second(functional.silu(first(functional.layer_norm(h, (5,)))))
        expected = head(functional.layer_norm(h, (5,)))
    else:
        expected = layers[0](x)
        for layer in layers[1:]:
            expected = layer(ACTIVATIONS[arena.actor.activation].function(expected))
    model = ticket.to_sequential(which)
    torch.testing.assert_close(model(x), expected)
    plain = {nn.Linear, nn.Tanh, nn.ReLU, nn.Sequential, nn.LayerNorm, ResidualBlock}
    assert {type(module) for module in model} <= plain
    model[0].weight.data.zero_()
    assert make(arena).initial.equal(ticket.initial)


def test_to_sequential_leaves_the_random_state_alone():
    ticket = make(ARENAS["critic"])
    state = torch.get_rng_state()
    ticket.to_sequential()
    assert torch.equal(state, torch.get_rng_state())


def test_to_sequential_normalises_first():
    arena = ARENAS["critic"]
    plain = make(arena)
    scaled = make(arena, offset=(1.0, 0.0, -2.0), scale=(2.0, 1.0, 0.5))
    model = scaled.to_sequential()
    assert isinstance(model[0], Normalise)
    x = torch.randn(5, 3)
    seen = (x - torch.tensor([1.0, 0.0, -2.0])) / torch.tensor([2.0, 1.0, 0.5])
    torch.testing.assert_close(model(x), plain.to_sequential()(seen))
    identity = make(arena, offset=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert isinstance(identity.to_sequential()[0], nn.Linear)


def test_density():
    assert make(ARENAS["actor"], density=1.0).density == 1
    ticket = make(ARENAS["actor"])
    assert ticket.density == ticket.mask.sum().item() / 42


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(42)}, TypeError, "mask must be bool"),
        ({"final": torch.ones(51)}, ValueError, "final must be zero off the mask"),
        ({"best": torch.ones(50)}, ValueError, "best must have shape"),
        ({"rewind": torch.ones(51).double()}, TypeError, "rewind must be float32"),
        ({"offset": (1.0,)}, ValueError, "offset must have 0 or 4 values"),
        ({"metadata": {"x": object()}}, TypeError, "JSON"),
    ],
)
def test_arguments_are_checked(change, error, match):
    ticket = make(ARENAS["actor"])
    with pytest.raises(error, match=match):
        Ticket(**{**vars(ticket), **change})


def test_unknown_row_and_mixed_architectures():
    with pytest.raises(ValueError, match="which must be one of initial, rewind, final, best"):
        make(ARENAS["actor"]).to_sequential("last")
    with pytest.raises(ValueError, match="share one architecture"):
        dump_tickets([make(ARENAS["actor"]), make(ARENAS["critic"])])
    with pytest.raises(ValueError, match="must not be empty"):
        dump_tickets([])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_tickets(tmp_path / "nothing.safetensors")


def test_truncated_files_are_refused(tmp_path):
    file = tmp_path / "ticket.safetensors"
    data = dump_tickets([make(ARENAS["critic"])])
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(StoreError, match=r"ticket\.safetensors is damaged.*run the sweep"):
            load_tickets(file)


def test_no_flipped_byte_goes_unseen(tmp_path):
    """Everywhere but in the header's padding a flipped bit must raise, never load other values."""
    file = tmp_path / "ticket.safetensors"
    ticket = make(ARENAS["actor"])
    data = bytearray(dump_tickets([ticket]))
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        try:
            loaded = load_tickets(file)
        except StoreError:
            continue
        assert_same(ticket, loaded[0])


def test_foreign_and_future_files_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match=r"foreign\.safetensors is damaged"):
        load_tickets(tmp_path / "foreign.safetensors")
    monkeypatch.setattr("sparse_tickets.ticket._FORMAT", 2)
    make(ARENAS["actor"]).save(tmp_path / "future.safetensors")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has format 2, this version reads 1"):
        load_tickets(tmp_path / "future.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "ticket.safetensors"
    make(ARENAS["actor"]).save(file)
    before = file.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_tickets.files.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        make(ARENAS["actor"], seed=3).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_header_is_readable_without_this_library():
    data = dump_tickets([make(ARENAS["actor"])])
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = json.loads(header["__metadata__"]["sparse_tickets"].partition(" ")[2])
    assert body["tickets"][0]["env"] == "CartPole-v1"
    assert (header["mask"]["dtype"], header["mask"]["shape"]) == ("U8", [1, 6])
