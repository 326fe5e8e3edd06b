"""Named tensors kept beside a sweep's units: experts, demonstrations, rewind points."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import suppress

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from sparse_tickets.files import write_atomic
from sparse_tickets.sweep.store import Store

__all__ = ["checksum", "read_data", "write_data"]

_CHECKSUM = "sha256"


def write_data(store: Store, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to ``data/<name>.safetensors``, atomically.

    Raises:
        StoreError: the disk is full.
    """
    contents = {key: value.contiguous().cpu() for key, value in tensors.items()}
    header = {_CHECKSUM: checksum(contents)}
    write_atomic(store.data / f"{name}.safetensors", to_safetensors(contents, metadata=header))


def read_data(store: Store, name: str) -> dict[str, Tensor] | None:
    """Read what `write_data` wrote; None if it is not there.

    A damaged file is named in a warning, renamed to ``*.damaged``, and counts as not there.
    """
    path = store.data / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get(_CHECKSUM) == checksum(tensors):
                return tensors
        reason = "does not match its checksum"
    except SafetensorError as error:
        reason = f"cannot be read ({error})"
    # Another process may have found the damage at the same moment.
    with suppress(FileNotFoundError):
        path.replace(path.with_name(path.name + ".damaged"))
    line = f"{path} {reason}"
    store.damaged.append(line)
    warnings.warn(f"{line}: moved aside, it will be made again", stacklevel=2)
    return None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, on whatever device: names, dtypes, shapes and contents."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
