"""What traces, scripts, exports or transforms a sparse policy."""

import io

import pytest
import torch
from programs import assert_zero, draw, make, truth
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_tickets import sparsify_
from sparse_tickets.linear import SparseLinear


def trace(policy, x):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(policy, (x,)), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def script_a_dense_copy(policy, x):
    return torch.jit.script(truth(policy))


def trace_symbolically(policy, x):
    return torch.fx.symbolic_trace(policy)


def make_graph(policy, x):
    return make_fx(policy)(x)


def export(policy, x):
    return torch.export.export(policy, (x,)).module()


def export_to_onnx(policy, x, tmp_path, **options):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "policy.onnx")
    torch.onnx.export(policy, (x,), path, **options)
    session = runtime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "take", [trace, script_a_dense_copy, trace_symbolically, make_graph, export]
)
def test_what_takes_a_policy_computes_it(take):
    policy = make()
    made = take(policy, draw())
    for _ in range(2):
        x = draw()
        torch.testing.assert_close(made(x), truth(policy)(x))


@pytest.mark.slow
# Warnings of torch's about itself.
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("options", [{"dynamo": True}, {"dynamo": False}], ids=str)
def test_onnx_exporters(options, tmp_path):
    policy = make().eval()
    made = export_to_onnx(policy, draw(), tmp_path, **options)
    x = draw()
    torch.testing.assert_close(made(x), truth(policy)(x))


def test_a_symbolic_trace_follows_masks_and_weights():
    policy = make()
    traced = torch.fx.symbolic_trace(policy)
    sparsify_(policy, 0.1)
    nn.init.orthogonal_(policy[2].weight.data)
    x = draw()
    torch.testing.assert_close(traced(x), truth(policy)(x))


def test_a_graph_of_gradients():
    policy, x = make(), draw()
    parameters = list(policy.parameters())

    def gradients(x):
        return torch.autograd.grad(policy(x).square().sum(), parameters)

    torch.testing.assert_close(list(make_fx(gradients)(x)(x)), list(gradients(x)))


def test_shapes_alone():
    policy = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert policy(torch.randn(3, 17)).shape == (3, 6)
        layer = SparseLinear(4, 4)
        layer(torch.randn(2, 4)).sum().backward()
        assert layer.weight.grad.shape == (4, 4)
        assert "kept" not in repr(layer)
    policy.to("meta")
    assert policy(draw().to("meta")).is_meta
    torch.set_default_device("meta")
    try:
        policy = make_on_cpu()
        x = torch.randn(5, 17, device="cpu")
        policy(x).square().sum().backward()
        with torch.no_grad():
            assert not policy(x[:1]).is_meta
        torch.optim.Adam(policy.parameters()).step()
    finally:
        torch.set_default_device(None)
    assert_zero(policy)


def make_on_cpu() -> nn.Sequential:
    return sparsify_(nn.Sequential(nn.Linear(17, 64, device="cpu"), nn.Tanh()), 0.3)
