"""What fused optimisers refuse, and what they leave to torch."""

import pytest
import torch
from torch import nn

from sparse_tickets import optim

pytestmark = pytest.mark.usefixtures("looks")


def test_refusals():
    params = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="capturable must be False"):
        optim.Adam(params, capturable=True)
    with pytest.raises(ValueError, match="differentiable must be False"):
        optim.SGD(params, differentiable=True)
    with pytest.raises(ValueError, match="max_grad_norm must be >= 0 or None, got -1"):
        optim.AdamW(params, max_grad_norm=-1)
    with pytest.raises(ValueError, match="learning rate"):
        optim.RMSprop(params, lr=-1)
    optim.Adam(params, fused=True)
    optim.Adam(params, foreach=True)


def test_memory_taken_again_for_another_size_is_not_overrun():
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = optim.SGD([parameter], momentum=0.9)
    for _ in range(3):
        parameter.grad = torch.ones(64, 64)
        optimizer.step()
    parameter.grad = None
    parameter.data = parameter.data[:2]
    parameter.grad = torch.ones(2, 64)
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


def test_optimisers_that_stay_torchs():
    params = list(nn.Linear(17, 6).parameters())
    scheduled = torch.optim.Adam(params)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)

    class Mine(torch.optim.Adam):
        pass

    for optimizer in (
        scheduled,
        Mine(params),
        torch.optim.Adagrad(params),
        torch.optim.Adam(params, differentiable=True),
    ):
        kind = type(optimizer)
        assert type(optim.fuse_(optimizer)) is kind
