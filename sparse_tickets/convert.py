"""Make an existing policy sparse in place, dense again, or 2:4 for tensor cores.

Conversion changes the class of a layer, not the layer: names, hooks, Parameters and every other
reference to it (a second name in the tree, an optimiser's parameter group) stay valid.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeGuard, cast, get_args

import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparse_tickets.casting import make_dense_, make_sparse_
from sparse_tickets.compaction import ELEMENTWISE
from sparse_tickets.connectivity import find_cuts
from sparse_tickets.coverage import check_module, find_matrices, group_shared
from sparse_tickets.linear import SparseLinear, count_kept
from sparse_tickets.prune import erk_counts
from sparse_tickets.selection import keep_largest
from sparse_tickets.sequential import make_fused_, make_plain_

__all__ = [
    "SparsifyWarning",
    "densify_",
    "from_torch_prune",
    "sparsify_",
    "to_semi_structured",
]

Scope = Literal["erk", "layer", "global"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Frames from a warning to the caller: _tell, sparsify_ and its two decorators.
_CALLER = 5
_log = logging.getLogger(__name__)


class SparsifyWarning(UserWarning):
    """What `sparsify_` did is complete, but may not be what was meant."""


@torch.inference_mode(False)
@torch.no_grad()
def sparsify_(
    module: nn.Module,
    density: float,
    scope: Scope = "erk",
    exclude: Iterable[str] = (),
    *,
    tied: bool = False,
) -> nn.Module:
    """Turn every linear layer of a module into a `SparseLinear` and prune it by magnitude.

    Layers of class ``nn.Linear`` exactly, and layers that are sparse already; a subclass may use
    its weight in ways that we cannot know. What was converted and what was not is logged at INFO
    under the logger ``sparse_tickets.convert``, and `summary` tells it at any time. Weights that a
    layer has pruned stay pruned. Layers that share a weight count once, and so do those that share
    a mask by `targets.tie_masks_`, where the first one's weight decides.

    The default shares the density out by Erdos-Renyi-Kernel, more to small layers and heads: of the
    three scopes the best for fresh policies of PPO, DQN and SAC from density 0.5 to 0.05, but for
    DQN at 0.5 (five seeds each: ``experiments/results/sparsify_default.md``). Ranking all layers
    together (``global``) prunes PPO's heads, which are initialised 100 times smaller, to nothing:
    the policy is a constant and never learns.

    Args:
        module: any module, changed in place. Its Parameters stay the same objects.
        density: fraction of weights to keep: exactly ``floor(density * N + 0.5)`` of all N under
            the scopes ``erk`` and ``global``, of each layer's own under ``layer``. Ties keep the
            earlier layer and the lower position.
        scope: ``erk`` gives each layer a density proportional to ``(in + out) / (in * out)``, full
            layers excepted, ``layer`` gives all the same; both keep the largest magnitudes within
            the layer. ``global`` ranks the magnitudes of all layers together, as suits a trained
            network.
        exclude: names, as in ``named_modules()``, of layers or of modules whose layers stay dense.
        tied: whether to prune a weight that something else than a converted layer holds too, as an
            embedding tied to its output layer.

    Returns:
        The module itself.

    Raises:
        TypeError: it is no module, or the density no number.
        ValueError: the density is outside [0, 1]; the scope is unknown; a name to exclude is no
            module or holds no weights; no linear layer is left; or a layer cannot be converted: its
            weight is recomputed by a hook or a parametrization (weight norm, spectral norm,
            ``torch.nn.utils.prune``), not yet initialised, on the meta device, an inference tensor,
            of a dtype or class that cannot be pruned, NaN, or tied to something else unasked.
            Nothing was changed then.

    Warns:
        SparsifyWarning: a layer, a row of an output layer or every path to an output was pruned
            away; less than half of the module's matrix weights (those excluded aside) lie in
            layers that were converted; or the module is a policy of Stable-Baselines3, whose
            model has to know.

    Example:
        >>> policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        >>> optimizer = torch.optim.Adam(policy.parameters())
        >>> sparsify_(policy, density=0.2, exclude=["2"])[0].density
        0.19921875
    """
    check_module(module)
    count_kept(density, 0)
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    layers = _select(module, exclude)
    for name, layer in layers.items():
        _check_convertible(name, layer)
    if not tied:
        _check_ties(module, layers)
    groups = group_shared(layers.values())
    masks = _masks(groups, density, scope)
    for group in groups:
        mask = masks.pop(0)
        for layer in group:
            sparse = layer if isinstance(layer, SparseLinear) else make_sparse_(layer)
            sparse.set_mask_(mask)
    make_fused_(module)
    _stop_fused_attention(module)
    _tell(module, layers, exclude, density, scope)
    return module


def _select(module: nn.Module, exclude: Iterable[str]) -> dict[str, nn.Linear]:
    """The layers to convert by their first name, each once."""
    named = dict(module.named_modules(remove_duplicate=False))
    linear = {name: layer for name, layer in named.items() if _is_meant(layer)}
    if not linear:
        raise ValueError(f"module must hold an nn.Linear, got {type(module).__name__} with none")
    done: set[nn.Module] = set()
    for name in [exclude] if isinstance(exclude, str) else exclude:
        if name not in named:
            raise ValueError(f"exclude must name modules among {sorted(linear)}, got {name!r}")
        if not find_matrices(named[name]):
            raise ValueError(
                f"exclude must name linear layers {sorted(linear)} or a module that holds weights, "
                f"got {name!r}"
            )
        done |= set(named[name].modules())
    chosen = {}
    for name, layer in linear.items():
        if layer not in done:
            chosen[name] = layer
            done.add(layer)
    if not chosen:
        raise ValueError(f"exclude must leave a linear layer, got all of {sorted(linear)}")
    return chosen


def _is_meant(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer to convert, or to refuse with a reason.

    Others are left dense. A parametrization makes a subclass of the layer's own class.
    """
    plain = type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)
    return plain in (nn.Linear, nn.LazyLinear) or isinstance(layer, SparseLinear)


def _check_convertible(name: str, layer: nn.Linear) -> None:
    """Raise ``ValueError`` if this layer cannot be converted: name it, and the way out."""
    weight = layer._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise ValueError(
            f"layer {name!r} must have its weight, got an nn.LazyLinear that has seen no input: "
            "run one batch through the module first, or exclude the layer"
        )
    if weight is None or parametrize.is_parametrized(layer):
        raise ValueError(
            f"layer {name!r} must own its weight as a Parameter, got one that a hook or "
            "parametrization recomputes: remove that first (torch.nn.utils.parametrize."
            "remove_parametrizations, torch.nn.utils.remove_weight_norm; for torch.nn.utils.prune "
            "use from_torch_prune), or exclude the layer"
        )
    if weight.is_meta:
        raise ValueError(
            f"layer {name!r} must have values to prune by, got a weight on the meta device: "
            "sparsify after to_empty and loading, or exclude the layer"
        )
    if type(weight.data) is not Tensor:
        raise ValueError(
            f"layer {name!r} must have a plain tensor as weight, got {type(weight.data).__name__}: "
            "sparsify before sharding or quantising, or exclude the layer"
        )
    _check_writable(name, weight)
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"layer {name!r} must have a weight of dtype {', '.join(map(str, _DTYPES))}, got "
            f"{weight.dtype}: convert or exclude the layer"
        )
    if any(rows.isnan().any() for rows in weight.split(1024)):
        raise ValueError(
            f"layer {name!r} must have a weight without NaN: mend or exclude the layer"
        )


def _check_writable(name: str, weight: Tensor) -> None:
    if weight.is_inference():
        raise ValueError(
            f"layer {name!r} must have a weight that can be written, got an inference tensor: "
            "build the module outside torch.inference_mode, or exclude the layer"
        )


def _check_ties(module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Raise ``ValueError`` if a weight to prune has another holder than the layers to convert."""
    converted = {id(layer.weight): name for name, layer in layers.items()}
    chosen = set(layers.values())
    for name, owner in module.named_modules():
        if owner in chosen:
            continue
        for parameter in owner._parameters.values():
            if id(parameter) in converted:
                layer = converted[id(parameter)]
                raise ValueError(
                    f"layer {layer!r} must have a weight of its own, got that of {name!r} "
                    f"({type(owner).__name__}), which pruning would zero too: "
                    f"exclude=[{layer!r}] leaves both dense, tied=True prunes both"
                )


def _masks(groups: Sequence[Sequence[nn.Linear]], density: float, scope: Scope) -> list[Tensor]:
    """The mask of each group; nothing is changed."""
    weights = [group[0].weight.detach() for group in groups]
    masks = [_joint_mask(group) for group in groups]
    total = count_kept(density, sum(weight.numel() for weight in weights))
    if scope == "global":
        return keep_largest(weights, masks, total)
    if scope == "layer":
        counts = [count_kept(density, weight.numel()) for weight in weights]
    else:
        # sum() of a bool mask would make it int64 first.
        left = [int(mask.count_nonzero()) for mask in masks]
        shapes = [(0, *weight.shape) for weight in weights]
        counts = erk_counts(shapes, min(total, sum(left)), left)
    return [
        keep_largest([weight], [mask], count)[0]
        for weight, mask, count in zip(weights, masks, counts, strict=True)
    ]


def _joint_mask(group: Sequence[nn.Linear]) -> Tensor:
    masks = [layer.mask for layer in group if isinstance(layer, SparseLinear)]
    return (
        torch.stack(masks).all(0) if masks else torch.ones_like(group[0].weight, dtype=torch.bool)
    )


def _stop_fused_attention(module: nn.Module) -> None:
    """Make encoders call their layers, as they do in training.

    For inference torch's ``TransformerEncoderLayer`` reads the weights itself, pruned ones too.
    """
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor &= not _holds_sparse(encoder)
        elif isinstance(encoder, nn.TransformerEncoderLayer) and _holds_sparse(encoder):
            encoder.activation_relu_or_gelu = 0


def _holds_sparse(module: nn.Module) -> bool:
    return any(isinstance(layer, SparseLinear) for layer in module.modules())


def _tell(
    module: nn.Module,
    layers: Mapping[str, nn.Linear],
    exclude: Sequence[str],
    density: float,
    scope: Scope,
) -> None:
    """Log what was converted and what was not; warn of what may not be meant."""
    every = find_matrices(module)
    aside = {key for name in exclude for key in find_matrices(module.get_submodule(name))}
    sparse = [matrix for matrix in every.values() if matrix.dense is None]
    dense = [matrix for key, matrix in every.items() if matrix.dense and key not in aside]
    left = ", ".join(map(str, dense[:8])) + (f" and {len(dense) - 8} more" if dense[8:] else "")
    _log.info(
        "sparsify_ converted %d layers, kept %d of %d weights; excluded: %s; left dense: %s",
        len(layers),
        sum(matrix.kept for matrix in sparse),
        sum(matrix.weights for matrix in sparse),
        ", ".join(exclude) or "none",
        left or "none",
    )
    converted = sum(matrix.weights for matrix in sparse)
    others = sum(matrix.weights for matrix in dense)
    if converted < others:
        warnings.warn(
            f"sparsify_ converted {converted:,} of the module's {converted + others:,} matrix "
            f"weights; left dense: {left}. sparse_tickets.summary(module) says why; exclude= what "
            "is meant to stay dense",
            SparsifyWarning,
            stacklevel=_CALLER,
        )
    if _is_torn_from_its_model(module):
        warnings.warn(
            "sparsify_ made a policy of Stable-Baselines3 sparse behind its model's back, so that "
            "target networks are pruned by their own weights and a file that the model saves does "
            "not load: sparse_tickets.integrations.sb3.sparsify_(model, density) sees to both",
            SparsifyWarning,
            stacklevel=_CALLER,
        )
    cuts = find_cuts(module, (*ELEMENTWISE, nn.Dropout, nn.PReLU)) if density else []
    if cuts:
        way = "" if scope == "erk" else "; scope='erk' leaves more to small layers"
        warnings.warn(
            f"sparsify_ to density {density} under scope {scope!r} cut the module's outputs off: "
            f"{'; '.join(cuts)}. What depends on no input is a constant, however long it is trained"
            f"{way}",
            SparsifyWarning,
            stacklevel=_CALLER,
        )


def _is_torn_from_its_model(module: nn.Module) -> bool:
    """Whether this is a policy of Stable-Baselines3, or a part that is one, not made sparse there.

    By name, since the library need not be installed.
    """
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    ours = "sparse_tickets.integrations.sb3.SparsePolicy"
    return "stable_baselines3.common.policies.BaseModel" in kinds and ours not in kinds


def densify_(module: nn.Module) -> nn.Module:
    """Turn every `SparseLinear` of a module back into ``nn.Linear``, pruned weights being zero.

    From then on nothing holds them there. Parameters stay the same objects.

    Args:
        module: any module, changed in place.

    Returns:
        The module itself.

    Example:
        >>> type(densify_(sparsify_(nn.Sequential(nn.Linear(4, 2)), 0.5))[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    check_module(module)
    for layer in list(module.modules()):
        if isinstance(layer, SparseLinear):
            make_dense_(layer)
    make_plain_(module)
    return module


def from_torch_prune(module: nn.Module) -> nn.Module:
    """Turn linear layers pruned with ``torch.nn.utils.prune`` into `SparseLinear`, in place.

    ``weight_orig`` becomes ``weight``, the same Parameter object, and ``weight_mask`` the mask.
    Other layers stay as they are, pruned or not.

    Args:
        module: any module, changed in place.

    Returns:
        The module itself.

    Raises:
        TypeError: it is no module.
        ValueError: no linear layer has a pruned weight, or one has a pruned bias or is an inference
            tensor. Nothing was changed then.

    Example:
        >>> layer = torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
        >>> from_torch_prune(layer).density
        0.5
    """
    check_module(module)
    pruned = {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and "weight_mask" in layer._buffers
    }
    if not pruned:
        raise ValueError(
            "module must hold an nn.Linear whose weight torch.nn.utils.prune has pruned, "
            f"got {type(module).__name__} with none"
        )
    for name, layer in pruned.items():
        if "bias_mask" in layer._buffers:
            raise ValueError(
                f"layer {name!r} must have an unpruned bias, got a pruned one: SparseLinear masks "
                "weights only; torch.nn.utils.prune.remove(layer, 'bias') makes it plain"
            )
        _check_writable(name, layer.get_parameter("weight_orig"))
    for layer in pruned.values():
        mask = layer.get_buffer("weight_mask") != 0
        torch_prune.remove(layer, "weight")
        make_sparse_(layer).set_mask_(mask)
    _stop_fused_attention(module)
    return module


@torch.no_grad()
def to_semi_structured(
    module: nn.Module, *, dtype: torch.dtype = torch.float16, exclude: Iterable[str] = ()
) -> nn.Module:
    """A copy for inference whose 2:4 layers run on an NVIDIA GPU's sparse tensor cores.

    Every `SparseLinear` becomes an ``nn.Linear`` with a weight as
    ``torch.sparse.to_sparse_semi_structured`` packs it: half the values and their places. All
    floating-point parameters and buffers of the copy are of `dtype`, and none asks for gradients.
    Masks of two in four come from `structure.n_m_mask` or the criterion ``2:4``.

    Args:
        module: a `SparseLinear`, or any module that holds some, on a CUDA device.
        dtype: float16 or bfloat16.
        exclude: names, as in ``named_modules()``, of layers or of modules whose layers stay as they
            are, in `dtype`: an action head is seldom a multiple of what the hardware takes.

    Returns:
        The copy.

    Raises:
        ValueError: a name to exclude is no module or holds no linear layer; no `SparseLinear` is
            left; one keeps more than two of four neighbouring inputs, is no multiple of torch's
            sizes, or is not on a CUDA device; or the dtype is another.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
    chosen = _select(module, exclude)
    layers = {name: layer for name, layer in chosen.items() if isinstance(layer, SparseLinear)}
    if not layers:
        raise ValueError(f"module must hold a SparseLinear to convert, got none in {list(chosen)}")
    for name, layer in layers.items():
        _check_semi_structured(name, layer, dtype)
    result = copy.deepcopy(module).to(dtype).requires_grad_(False)
    packed: dict[int, nn.Parameter] = {}
    for name in layers:
        layer = cast(SparseLinear, result.get_submodule(name))
        weight = make_dense_(layer).weight
        if id(weight) not in packed:
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
            packed[id(weight)] = nn.Parameter(sparse, requires_grad=False)
        layer.weight = packed[id(weight)]
    return result


def _check_semi_structured(name: str, layer: SparseLinear, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` if torch cannot pack this layer, and say which and why."""
    out, inp = layer.weight.shape
    rows, columns = _semi_structured_sizes(dtype)
    if not out or not inp or out % rows or inp % columns:
        raise ValueError(
            f"layer {name!r} must be a positive multiple of {rows} x {columns} (out x in) for "
            f"torch's 2:4 format in {dtype}, got {out} x {inp}; exclude it to leave it as it is"
        )
    most = int(layer.mask.unflatten(1, (-1, 4)).sum(2).amax())
    if most > 2:
        raise ValueError(
            f"layer {name!r} must keep at most 2 of every 4 neighbouring inputs, got {most}; "
            "structure.n_m_mask(scores, 2, 4) makes such a mask"
        )
    if layer.weight.device.type != "cuda":
        raise ValueError(
            f"layer {name!r} must be on a CUDA device, got {layer.weight.device}: torch packs "
            "2:4 weights for NVIDIA GPUs only"
        )


def _semi_structured_sizes(dtype: torch.dtype) -> tuple[int, int]:
    """What rows and columns of a weight must be multiples of: torch's own table."""
    cutlass = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    kind = (
        torch.sparse.SparseSemiStructuredTensorCUTLASS
        if cutlass
        else torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    )
    sizes = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return sizes.sparse_min_rows, sizes.sparse_min_cols
