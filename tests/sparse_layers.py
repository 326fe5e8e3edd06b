"""Layers to test, and what training them and watching their masks takes."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparse_tickets.linear import SparseLinear

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adam-l2": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True
    ),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
}


# Nothing pruned; torch's product over zeros; wide and sparse enough for a sparse format.
PATHS = {"dense": (6, 5, 1.0), "masked": (6, 5, 0.4), "sparse": (48, 40, 0.1)}


def pruned_layer(density: float = 0.4, seed: int = 0, **kwargs) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(6, 5, **kwargs).prune_(density)


def sparse_layers(module: nn.Module) -> list[SparseLinear]:
    return [layer for layer in module.modules() if isinstance(layer, SparseLinear)]


def kept(module: nn.Module) -> int:
    return sum(int(layer.mask.sum()) for layer in sparse_layers(module))


def assert_zero_off_mask(layer: SparseLinear, *optimizers: torch.optim.Optimizer) -> None:
    tensors = [layer._parameters["weight"].detach()]
    if layer.weight.grad is not None:
        tensors.append(layer.weight.grad)
    for optimizer in optimizers:
        state = optimizer.state.get(layer.weight, {}).values()
        tensors += [t for t in state if torch.is_tensor(t) and t.shape == layer.mask.shape]
    for tensor in tensors:
        assert not tensor[~layer.mask].any()


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(7, 6)).square().sum().backward()
        optimizer.step()


@contextmanager
def written_meanwhile(mask: torch.Tensor) -> Iterator[None]:
    """Another thread writes the mask again and again."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            mask.bernoulli_(0.3)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def dense_twin(layer: SparseLinear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    with torch.no_grad():
        twin.weight.copy_(layer.weight * layer.mask)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


def clone_by_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
