"""A sparse layer's life in any order: whatever happened to it, it answers as masked weights do."""

import copy
import io
import pickle

import torch
import torch.nn.functional as F
from fuzzing import drawn
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from sparse_tickets import SparseLinear
from sparse_tickets import optim as fused

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, momentum=0.5),
    "fused adam": lambda parameters: fused.Adam(parameters, 0.01),
    "fused sgd": lambda parameters: fused.SGD(parameters, 0.05, momentum=0.9),
}
REINITIALISED = {
    "orthogonal": lambda layer: nn.init.orthogonal_(layer.weight),
    "kaiming": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "reset": lambda layer: layer.reset_parameters(),
    "data": lambda layer: layer.weight.data.normal_(),
    "new data": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "parameter": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.randn_like(layer.weight))
    ),
    "strided": lambda layer: setattr(
        layer.weight, "data", torch.randn_like(layer.weight).T.contiguous().T
    ),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2}
seeds = st.integers(0, 1 << 20)


class Life(RuleBasedStateMachine):
    @initialize(
        inputs=st.sampled_from((1, 3, 16, 33, 64)),
        outputs=st.sampled_from((1, 5, 16, 40, 64)),
        bias=st.booleans(),
        seed=seeds,
    )
    def begin(self, inputs, outputs, bias, seed):
        torch.manual_seed(seed)
        self.layer = SparseLinear(inputs, outputs, bias)
        self.optimizer = None
        self.clean = True  # whether pruned weights must lie there as zero

    @rule(density=st.sampled_from((0.0, 0.02, 0.1, 0.5, 0.9, 1.0)))
    def prune(self, density):
        before = self.layer.mask.clone()
        self.layer.prune_(density)
        assert not (self.layer.mask & ~before).any()
        self.clean = True

    @rule(density=st.floats(0, 1), seed=seeds)
    def set_mask(self, density, seed):
        torch.manual_seed(seed)
        self.layer.set_mask_(torch.rand(self.layer.weight.shape) < density)
        self.clean = True

    @rule(kind=st.sampled_from(sorted(OPTIMIZERS)), steps=st.integers(1, 3), seed=seeds)
    def train(self, kind, steps, seed):
        torch.manual_seed(seed)
        if self.optimizer is None or self.optimizer[0] != kind:
            self.optimizer = kind, OPTIMIZERS[kind](self.layer.parameters())
        optimizer = self.optimizer[1]
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(8, self.layer.in_features, dtype=self.layer.weight.dtype)
            self.layer(x).square().mean().backward()
            assert not self.layer.weight.grad[~self.layer.mask].any()
            optimizer.step()
        self.clean = True
        for state in optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value) and value.shape == self.layer.weight.shape:
                    assert not value[~self.layer.mask].any()

    @rule(how=st.sampled_from(sorted(REINITIALISED)), seed=seeds)
    def reinitialise(self, how, seed):
        torch.manual_seed(seed)
        if how == "orthogonal" and self.layer.weight.dtype == torch.bfloat16:
            how = "kaiming"  # torch has no QR of bfloat16
        REINITIALISED[how](self.layer)
        if how == "parameter":
            self.optimizer = None
        self.clean = False

    @rule()
    def apply_mask(self):
        self.layer.apply_mask_()
        self.clean = True

    @rule(value=st.sampled_from((1.0, float("nan"), float("inf"), 1e30)))
    def write_off_the_mask(self, value):
        """As an average of weights, or another process, may."""
        self.layer.weight.data[~self.layer.mask] = value
        self.clean = False

    @rule(how=st.sampled_from(("deepcopy", "pickle", "save")))
    def copy(self, how):
        if how == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        elif how == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        else:
            file = io.BytesIO()
            torch.save(self.layer, file)
            file.seek(0)
            self.layer = torch.load(file, weights_only=False)
        self.optimizer = None

    @rule(dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    def cast(self, dtype):
        self.layer.to(dtype)
        self.optimizer = None

    @rule(how=st.sampled_from(("self", "new", "dense")), assign=st.booleans(), seed=seeds)
    def load(self, how, assign, seed):
        torch.manual_seed(seed)
        layer = self.layer
        options = {"bias": layer.bias is not None, "dtype": layer.weight.dtype}
        other = SparseLinear(layer.in_features, layer.out_features, **options)
        if how == "self":
            other = copy.deepcopy(layer)
        elif how == "new":
            other.prune_(0.3)
        state = other.state_dict()
        if how == "dense":
            del state["mask"]
        layer.load_state_dict(state, strict=how != "dense", assign=assign)
        if assign:
            self.optimizer = None
        self.clean = True

    @rule(training=st.booleans(), needed=st.booleans())
    def change_mode(self, training, needed):
        self.layer.train(training)
        self.layer.weight.grad = None
        if not needed:
            with torch.no_grad():
                self.check(torch.randn(4, self.layer.in_features, dtype=self.layer.weight.dtype))

    @invariant()
    def answers_as_masked_weights_do(self):
        layer = self.layer
        assert layer.mask.dtype == torch.bool
        if self.clean:
            assert not layer.weight.detach()[~layer.mask].any()
        for rows in (0, 1, 3, 70):
            self.check(torch.randn(rows, layer.in_features, dtype=layer.weight.dtype))

    def check(self, x):
        layer = self.layer
        weight = torch.where(layer.mask, layer.weight.detach(), 0).requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
        expected = F.linear(x, weight, bias)
        found = layer(x)
        assert found.dtype == x.dtype
        self.close(found, expected)
        if not torch.is_grad_enabled():
            return
        scale = torch.linspace(-1, 1, found.numel(), dtype=x.dtype).reshape(found.shape)
        wanted = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        same = [weight] if bias is None else [weight, bias]
        ours = torch.autograd.grad(found, wanted, scale)
        theirs = torch.autograd.grad(expected, same, scale)
        self.close(ours[0], torch.where(layer.mask, theirs[0], 0))
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            self.close(one, other)

    def close(self, one, other):
        size = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        tolerance = TOLERANCE[one.dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * size)


Life.TestCase.settings = drawn(8, steps=8)
TestLife = Life.TestCase
