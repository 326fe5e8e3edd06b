"""A ticket's policy in a file that others read without this package: torch, safetensors or ONNX."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from sparse_tickets.compaction import compact
from sparse_tickets.files import write_atomic
from sparse_tickets.ticket import Normalise, Ticket, to_modules

__all__ = ["check_suffix", "export_ticket", "ticket_tensors"]

SUFFIXES = (".pt", ".safetensors", ".onnx")


def export_ticket(ticket: Ticket, path: str | Path, which: str = "final") -> None:
    """Write a ticket's actor to a file that needs no sparse_tickets to read, atomically.

    The suffix says how:

    - ``.pt``: `ticket_tensors` in one dict for ``torch.load(path, weights_only=True)``, and under
      ``about`` where they come from, as strings;
    - ``.safetensors``: the same tensors, what is ``about`` them in the header;
    - ``.onnx``: the actor made `compact`, ``observation [batch, features] -> head [batch, out]``,
      float32, the observation as the environment gives it. Needs onnx and onnxscript.

    Args:
        ticket: what to export.
        path: a file ending in ``.pt``, ``.safetensors`` or ``.onnx``.
        which: ``initial``, ``rewind``, ``final`` or ``best`` weights.

    Raises:
        ValueError: another suffix, no such weights, or a package that ONNX needs is missing.
        StoreError: the disk is full, or nothing may be written there.
    """
    path = Path(path)
    suffix = check_suffix(path)
    about = {
        name: str(getattr(ticket, name))
        for name in (
            "env",
            "algo",
            "condition",
            "controls",
            "seed",
            "level",
            "activation",
            "architecture",
        )
    } | {"weights": which}
    if suffix == ".onnx":
        data = _onnx(ticket, which, about)
    elif suffix == ".safetensors":
        data = to_safetensors(ticket_tensors(ticket, which), metadata=about)
    else:
        buffer = io.BytesIO()
        torch.save({**ticket_tensors(ticket, which), "about": about}, buffer)
        data = buffer.getvalue()
    write_atomic(path, data)


def check_suffix(path: Path) -> str:
    """The suffix that says how to export.

    Raises:
        ValueError: another suffix, or a package that ONNX needs is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"an export must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(
            f"an export to {path.suffix} needs {' and '.join(missing)}: pip install onnx onnxscript"
            ", or export to .pt or .safetensors"
        )
    return path.suffix


def ticket_tensors(ticket: Ticket, which: str = "final") -> dict[str, Tensor]:
    """A ticket's actor as plain tensors.

    Args:
        ticket: whose.
        which: ``initial``, ``rewind``, ``final`` or ``best`` weights.

    Returns:
        ``0.weight``, ``0.bias``, ``2.weight``, ... as in the ``state_dict`` of an ``nn.Sequential``
        of linear layers with activations between them, float32, pruned weights zero (a residual
        network's are ``0.weight``, ``1.layers.1.weight``, ``1.layers.3.weight``, ..., as in
        `Ticket.to_sequential`); ``0.mask``, ``2.mask``, ... bool like the weights; ``offset`` and
        ``scale``, one value for each feature: the network was trained on ``(observation - offset) /
        scale``; and ``log_std`` of each action where the actor was trained as a Gaussian's mean. A
        squashed policy's outputs are means, then log standard deviations: its greedy action is the
        hyperbolic tangent of a mean, stretched to the bounds of the action.

    Raises:
        ValueError: no such weights.
    """
    arena, row = ticket.arena, ticket.row(which)
    net = arena.actor
    tensors = {}
    modules = to_modules(net, row).named_modules()
    linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    for layer, (name, linear) in enumerate(linears):
        tensors[f"{name}.weight"] = linear.weight.detach()
        tensors[f"{name}.bias"] = linear.bias.detach()
        tensors[f"{name}.mask"] = net.weight(ticket.mask[None], layer)[0].clone()
    width = ticket.sizes[0]
    tensors["offset"] = row.new_tensor(ticket.offset or [0.0] * width)
    tensors["scale"] = row.new_tensor(ticket.scale or [1.0] * width)
    if arena.log_std is not None:
        tensors["log_std"] = row[arena.log_std :][: net.sizes[-1]].clone()
    return tensors


def _onnx(ticket: Ticket, which: str, about: dict[str, str]) -> bytes:
    modules = list(ticket.to_sequential(which))
    first = int(isinstance(modules[0], Normalise))
    network = nn.Sequential(*modules[first:])
    # LayerNorm looks at units without inputs or readers, too.
    whole = ticket.arena.actor.has_layernorm
    small = nn.Sequential(*modules[:first], network if whole else compact(network))
    program: Any = torch.onnx.export(
        small.eval(),
        # More than one row, which torch.export would take for a constant.
        (torch.zeros(2, ticket.sizes[0], dtype=torch.float32, device="cpu"),),
        dynamo=True,
        verbose=False,
        input_names=["observation"],
        output_names=["head"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    program.model.metadata_props.update(about)
    return program.model_proto.SerializeToString()
