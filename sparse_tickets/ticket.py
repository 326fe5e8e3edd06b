"""A ticket: a mask, the weights around it, and where they came from; safetensors in and out.

On disk masks are bit-packed and weight matrices are kept on the support only. Tickets of one
architecture share a file; a file that does not hold exactly what was written is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .files import StoreError, write_atomic
from .kernels.activations import LAYERNORM
from .kernels.arena import Arena, Net
from .kernels.errors import check_dtype, check_shape

__all__ = [
    "Normalise",
    "ResidualBlock",
    "Ticket",
    "dump_tickets",
    "load_tickets",
    "save_tickets",
    "to_modules",
]

ROWS = ("initial", "rewind", "final", "best")

_FORMAT = 1
_HEADER = "sparse_tickets"
_ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
_LAYOUT = (
    "sizes",
    "activation",
    "critic",
    "continuous",
    "prune_critic",
    "squashed",
    "architecture",
)
# Fields that came later, left out where they say nothing: earlier versions read such tickets.
_LATER = {"squashed": False, "architecture": "mlp"}
_ORIGIN = ("env", "algo", "seed", "condition", "controls", "level", "offset", "scale", "metadata")


class Normalise(nn.Module):
    """Observations as the policy was trained on them: ``(x - offset) / scale``, both constant."""

    offset: Tensor
    scale: Tensor

    def __init__(self, offset: Sequence[float], scale: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32, device="cpu"))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., features]``."""
        return (x - self.offset) / self.scale


def _between(activation: str, width: int) -> nn.Module:
    """What stands between two layers: one module, so that their names are the same with any."""
    name = activation.removeprefix(LAYERNORM)
    module = _ACTIVATIONS[name]()
    if name == activation:
        return module
    return nn.Sequential(_layernorm(width), module)


def _layernorm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False)


class ResidualBlock(nn.Module):
    """``h + layers(h)``, the layers being LayerNorm, linear, activation, linear."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        """Add to ``h [..., features]`` what the layers make of it."""
        return h + self.layers(h)


def to_modules(net: Net, row: Tensor) -> nn.Sequential:
    """A network of a row ``[T]`` of the arena as plain torch modules; pruned weights are zeros.

    Its `nn.Linear`s come in the order of the network's layers.
    """
    linears = []
    for weight, bias in net.layers(row[None]):
        out, inp = weight.shape[1:]
        linear = nn.utils.skip_init(nn.Linear, inp, out, dtype=row.dtype, device=row.device)
        linear.weight.data.copy_(weight[0])
        linear.bias.data.copy_(bias[0])
        linears.append(linear)
    if net.architecture == "residual":
        stem, *inner, head = linears
        blocks = [
            ResidualBlock(
                _layernorm(stem.out_features),
                first,
                _between(net.activation, first.out_features),
                second,
            )
            for first, second in zip(inner[::2], inner[1::2], strict=True)
        ]
        return nn.Sequential(stem, *blocks, _layernorm(stem.out_features), head)
    modules: list[nn.Module] = []
    for linear in linears:
        modules += [linear, _between(net.activation, linear.out_features)]
    return nn.Sequential(*modules[:-1])


@dataclass(frozen=True, eq=False)
class Ticket:
    """One policy's mask and weights at one level, in the arena's layout (CPU, float32).

    Attributes:
        sizes: features of the actor from observation to action head.
        activation: one of `kernels.activations.ACTIVATIONS`.
        env: environment id.
        algo: what trained it.
        seed: its seed.
        condition: how its mask and weights were drawn.
        controls: ``own`` or ``ticket``: whose masks the condition is built on.
        level: level of iterative magnitude pruning.
        mask: ``[N]`` bool over the prunable weights.
        initial: ``[T]`` the row at initialisation, zero off the mask.
        rewind: ``[T]`` the row training started from, zero off the mask.
        final: ``[T]`` the row training ended with.
        best: ``[T]`` the row of the best checkpoint.
        critic: features of the critic, or of both critics of a squashed policy, or None.
        continuous: whether the row ends with ``log_std``.
        prune_critic: whether the mask covers the critics' weights too.
        squashed: whether the actor's outputs are means and log standard deviations of a squashed
            Gaussian.
        architecture: one of `kernels.arena.ARCHITECTURES`.
        offset: subtracted from observations; empty for none.
        scale: divides observations; empty for none.
        metadata: anything else worth keeping, as JSON.

    The tensors are copied. `initial` and `rewind` are set to zero off the mask.

    Raises:
        ValueError: a wrong shape, or `final` or `best` not zero off the mask.
        TypeError: a wrong dtype, or metadata that JSON cannot hold.
    """

    sizes: tuple[int, ...]
    activation: str
    env: str
    algo: str
    seed: int
    condition: str
    controls: str
    level: int
    mask: Tensor = field(repr=False)
    initial: Tensor = field(repr=False)
    rewind: Tensor = field(repr=False)
    final: Tensor = field(repr=False)
    best: Tensor = field(repr=False)
    critic: tuple[int, ...] | None = None
    continuous: bool = False
    prune_critic: bool = False
    squashed: bool = False
    architecture: str = "mlp"
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sizes", "critic", "offset", "scale"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else tuple(value))
        arena = self.arena
        check_shape("mask", self.mask, (arena.prunable,))
        check_dtype("mask", self.mask, torch.bool)
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())
        for name in ROWS:
            row: Tensor = getattr(self, name)
            check_shape(name, row, (arena.size,))
            check_dtype(name, row, torch.float32)
            row = row.detach().cpu().clone()
            pruned = row[: arena.prunable][~self.mask]
            if name in ("final", "best") and pruned.count_nonzero():
                raise ValueError(
                    f"{name} must be zero off the mask, got {int(pruned.count_nonzero())} others"
                )
            row[: arena.prunable][~self.mask] = 0
            object.__setattr__(self, name, row)
        for name, values in (("offset", self.offset), ("scale", self.scale)):
            if len(values) not in (0, self.sizes[0]):
                raise ValueError(f"{name} must have 0 or {self.sizes[0]} values, got {values}")
        json.dumps(self.metadata)

    @staticmethod
    def of(arena: Arena, **fields: Any) -> Ticket:
        """A ticket laid out like an arena; ``fields`` are the attributes the arena does not say."""
        critic = arena.critic
        return Ticket(
            sizes=arena.actor.sizes,
            activation=arena.actor.activation,
            critic=None if critic is None else critic.sizes,
            continuous=arena.log_std is not None,
            prune_critic=critic is not None and critic.weights[0] < arena.prunable,
            squashed=arena.squashed,
            architecture=arena.actor.architecture,
            **fields,
        )

    @property
    def arena(self) -> Arena:
        """The layout of `mask` and the weight rows."""
        return Arena.build(
            self.sizes,
            self.critic,
            activation=self.activation,
            architecture=self.architecture,
            continuous=self.continuous,
            prune_critic=self.prune_critic,
            squashed=self.squashed,
        )

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that are kept."""
        return float(self.mask.double().mean())

    def row(self, which: str) -> Tensor:
        """``[T]`` the row of that name: ``initial``, ``rewind``, ``final`` or ``best``.

        Raises:
            ValueError: no such row.
        """
        if which not in ROWS:
            raise ValueError(f"which must be one of {', '.join(ROWS)}, got {which!r}")
        return getattr(self, which)

    def to_sequential(self, which: str = "final") -> nn.Sequential:
        """The actor as plain torch modules, ready for any observation of its environment.

        Args:
            which: ``initial``, ``rewind``, ``final`` or ``best``.

        Returns:
            `Normalise` first where observations are normalised, then `nn.Linear` layers with the
            activation between them, or `nn.Sequential` of `nn.LayerNorm` and the activation; of a
            residual network a linear layer, a `ResidualBlock` each, `nn.LayerNorm` and the head.
            Pruned weights are zeros.

        Raises:
            ValueError: no such row.
        """
        row = self.row(which)
        modules: list[nn.Module] = []
        if any(self.offset) or any(value != 1 for value in self.scale):
            width = self.sizes[0]
            modules.append(Normalise(self.offset or [0.0] * width, self.scale or [1.0] * width))
        return nn.Sequential(*modules, *to_modules(self.arena.actor, row))

    def save(self, path: str | Path) -> None:
        """Write this ticket to a file of its own, atomically.

        Raises:
            StoreError: the disk is full.
        """
        save_tickets(path, [self])

    @staticmethod
    def load(path: str | Path) -> Ticket:
        """Read a file that holds one ticket.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the file is damaged or does not hold exactly one ticket.
        """
        tickets = load_tickets(path)
        if len(tickets) != 1:
            raise StoreError(f"{path} holds {len(tickets)} tickets: read it with load_tickets")
        return tickets[0]


def save_tickets(path: str | Path, tickets: Sequence[Ticket]) -> None:
    """Write tickets of one architecture to a safetensors file, atomically.

    Raises:
        ValueError: no tickets, or tickets of several architectures.
        StoreError: the disk is full.
    """
    write_atomic(Path(path), dump_tickets(tickets))


def dump_tickets(tickets: Sequence[Ticket]) -> bytes:
    """The bytes of a tickets file; the same tickets give the same bytes.

    Tensors: ``mask`` uint8 ``[P, ceil(N / 8)]``, bits from the highest; and for each of initial,
    rewind, final and best ``<row>.support``, float32, the kept weights of all tickets in order, and
    ``<row>.rest`` ``[P, T - N]``. The header holds a checksum and JSON.

    Raises:
        ValueError: no tickets, or tickets of several architectures.
    """
    if not tickets:
        raise ValueError("tickets must not be empty")
    layouts = {tuple(getattr(ticket, name) for name in _LAYOUT) for ticket in tickets}
    if len(layouts) > 1:
        raise ValueError(f"tickets must share one architecture, got {sorted(map(str, layouts))}")
    prunable = tickets[0].arena.prunable
    mask = torch.stack([ticket.mask for ticket in tickets])
    tensors = {"mask": torch.from_numpy(np.packbits(mask.numpy(), axis=1))}
    for name in ROWS:
        rows = torch.stack([getattr(ticket, name) for ticket in tickets])
        tensors[f"{name}.support"] = rows[:, :prunable][mask]
        tensors[f"{name}.rest"] = rows[:, prunable:].contiguous()
    layout = {name: getattr(tickets[0], name) for name in _LAYOUT}
    for name, unset in _LATER.items():
        if layout[name] == unset:
            del layout[name]
    body = json.dumps(
        {
            "format": _FORMAT,
            "layout": layout,
            "tickets": [{name: getattr(t, name) for name in _ORIGIN} for t in tickets],
        }
    )
    # One header entry only: the order of several is not fixed from run to run.
    return to_safetensors(tensors, metadata={_HEADER: f"{_checksum(body, tensors)} {body}"})


def load_tickets(path: str | Path) -> list[Ticket]:
    """Read every ticket of a file.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is damaged, or another version wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tickets file {path}")
    try:
        # Old versions of safetensors read onto torch's default device.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            header = (file.metadata() or {})[_HEADER]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest, _, body = header.partition(" ")
        if digest != _checksum(body, tensors):
            raise ValueError("its contents do not match its checksum")
        content = json.loads(body)
        if content["format"] == _FORMAT:
            return _unpack(content, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"tickets file {path} is damaged ({error}). Delete it, or restore a copy; "
            "in a sweep's folder run the sweep again, which redoes that unit"
        ) from error
    raise StoreError(
        f"tickets file {path} has format {content['format']}, this version reads {_FORMAT}: "
        "use the version of sparse-tickets that wrote it"
    )


def _unpack(content: dict[str, Any], tensors: dict[str, Tensor]) -> list[Ticket]:
    layout, origins = _LATER | content["layout"], content["tickets"]
    rest = {name: layout[name] for name in _LAYOUT if name not in ("sizes", "critic")}
    prunable = Arena.build(layout["sizes"], layout["critic"], **rest).prunable
    packed = tensors["mask"].numpy()
    mask = torch.from_numpy(np.unpackbits(packed, axis=1, count=prunable).astype(bool))
    rows = {}
    for name in ROWS:
        kept = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
        kept[mask] = tensors[f"{name}.support"]
        rows[name] = torch.cat([kept, tensors[f"{name}.rest"]], dim=1)
    tickets = []
    for index, origin in enumerate(origins):
        values: dict[str, Any] = {name: row[index] for name, row in rows.items()}
        tickets.append(Ticket(**layout, **origin, **values, mask=mask[index]))
    return tickets


def _checksum(body: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
