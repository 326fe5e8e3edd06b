"""Exported tickets: read without this package, and the same network as the ticket."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sparse_tickets import SparseLinear, sparsify_
from sparse_tickets.export import export_ticket, ticket_tensors
from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena, chain
from sparse_tickets.ticket import ROWS, Ticket

EXPORTER = ("onnx", "onnxscript")
needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in (*EXPORTER, "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
SCALED = {"offset": (0.5, -1.0, 0.0), "scale": (2.0, 1.0, 0.1)}


def make(density=0.3, activation="tanh", continuous=False, architecture="mlp", **fields):
    sizes = chain(architecture, 3, (16, 16), 2)
    layout = {"activation": activation, "architecture": architecture, "continuous": continuous}
    arena = Arena.build(sizes, (3, 5, 1), **layout)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(arena.prunable, generator=generator) < density
    rows = {name: torch.randn(arena.size, generator=generator) for name in ROWS}
    for name in ("final", "best"):
        rows[name][: arena.prunable][~mask] = 0
    origin = {"env": "Mine-v0", "algo": "ppo", "seed": 3, "condition": "mask/weights", "level": 4}
    return Ticket.of(arena, mask=mask, controls="own", **rows, **origin, **fields)


OTHERS_READ = """
import sys
sys.modules["sparse_tickets"] = None  # importing it fails
path, out = sys.argv[1:]
import torch
from torch import nn
if path.endswith(".pt"):
    tensors = torch.load(path, weights_only=True)
else:
    from safetensors.torch import load_file
    tensors = load_file(path)
net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
net.load_state_dict({name: tensors[name] for name in net.state_dict()})
observation = torch.linspace(-3, 3, 60).view(20, 3)
torch.save(net((observation - tensors["offset"]) / tensors["scale"]), out)
"""


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_others_read_it_without_this_package(suffix, tmp_path):
    ticket, file, out = make(**SCALED), tmp_path / f"ticket{suffix}", tmp_path / "out.pt"
    export_ticket(ticket, file)
    done = subprocess.run(
        [sys.executable, "-P", "-c", OTHERS_READ, file, out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    observation = torch.linspace(-3, 3, 60).view(20, 3)
    output = torch.load(out, weights_only=True)
    torch.testing.assert_close(output, ticket.to_sequential()(observation))


def test_every_format_holds_the_same_and_says_where_it_comes_from(tmp_path):
    ticket = make(continuous=True, **SCALED)
    export_ticket(ticket, tmp_path / "ticket.pt", "initial")
    export_ticket(ticket, tmp_path / "ticket.safetensors", "initial")
    first = torch.load(tmp_path / "ticket.pt", weights_only=True)
    about = first.pop("about")
    with safe_open(tmp_path / "ticket.safetensors", framework="pt") as file:
        assert file.metadata() == about
        second = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about["env"] == "Mine-v0"
    assert about["activation"] == "tanh"
    assert about["weights"] == "initial"
    wanted = ticket_tensors(ticket, "initial")
    assert first.keys() == second.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(first[name], tensor), name
        assert torch.equal(second[name], tensor), name
        # No storage shared with the whole ticket, which torch.save would write each time.
        assert first[name].untyped_storage().nbytes() == first[name].nbytes


@pytest.mark.parametrize("which", ROWS)
def test_tensors_are_a_sparse_networks_state(which):
    ticket = make(continuous=True)
    tensors = ticket_tensors(ticket, which)
    assert torch.equal(tensors.pop("offset"), torch.zeros(3))
    assert torch.equal(tensors.pop("scale"), torch.ones(3))
    assert torch.equal(tensors.pop("log_std"), ticket.row(which)[-2:])
    net = nn.Sequential(
        SparseLinear(3, 16), nn.Tanh(), SparseLinear(16, 16), nn.Tanh(), SparseLinear(16, 2)
    )
    net.load_state_dict(tensors)
    assert sum(int(layer.mask.sum()) for layer in net[::2]) == int(ticket.mask.sum())
    x = torch.randn(5, 3)
    torch.testing.assert_close(net(x), ticket.to_sequential(which)(x))
    assert "log_std" not in ticket_tensors(make())


def test_a_residual_networks_tensors_are_its_modules_state():
    ticket = make(architecture="residual")
    network, tensors = ticket.to_sequential(), ticket_tensors(ticket)
    state = network.state_dict()
    assert list(state) == [
        f"{name}.{kind}"
        for name in ("0", "1.layers.1", "1.layers.3", "3")
        for kind in ("weight", "bias")
    ]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    sparse, x = sparsify_(ticket.to_sequential("initial"), density=1.0), torch.randn(5, 3)
    sparse.load_state_dict({name: tensors[name] for name in sparse.state_dict()})
    assert sparse[1].layers[1].mask.sum() == ticket.arena.actor.weight(ticket.mask[None], 1).sum()
    torch.testing.assert_close(sparse(x), network(x))


@needs_onnx
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("fields", [SCALED, {}], ids=["scaled", "as it is"])
@pytest.mark.parametrize("activation", [*KNOWN, "layernorm-relu", "residual"])
@pytest.mark.parametrize("density", [0.3, 0.03, 0.0])
def test_onnxruntime_computes_the_ticket(density, activation, fields, tmp_path):
    import onnx
    import onnxruntime

    kind = {"activation": activation}
    if activation == "residual":
        kind = {"architecture": activation}
    ticket, file = make(density, **kind, **fields), tmp_path / "ticket.onnx"
    export_ticket(ticket, file)
    assert list(tmp_path.iterdir()) == [file]
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert "activation" in {entry.key for entry in model.metadata_props}
    if 0 < density < 0.1 and activation in KNOWN:
        stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        assert stored < 4 * (3 * 16 + 16 * 16 + 16 * 2) / 4  # compact
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 33):
        observation = torch.randn(batch, 3)
        (output,) = session.run(["head"], {"observation": observation.numpy()})
        expected = ticket.to_sequential()(observation).detach()
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ticket", "ticket.pth", "ticket.ONNX"])
def test_another_suffix_is_refused_and_nothing_written(name, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pt, \.safetensors, \.onnx, got '.*ticket"):
        export_ticket(make(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_an_exporter_of_onnx_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_tickets.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs onnx and onnxscript: pip install onnx onnxscript"):
        export_ticket(make(), tmp_path / "ticket.onnx")
    export_ticket(make(), tmp_path / "ticket.pt")


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which must be one of initial, rewind, final, best"):
        export_ticket(make(), tmp_path / "ticket.pt", "last")
    assert not list(tmp_path.iterdir())
