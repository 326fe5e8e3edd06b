"""Named tensors as safetensors that say what they are and whose, with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from sparse_tickets.sweep.integrity import Damaged, parse_json

__all__ = ["checksum", "dump_tensors", "parse_tensors"]

_HEADER = "sparse_tickets"
# What earlier versions wrote: the checksum alone.
_EARLIER_HEADER = "sha256"


def dump_tensors(tensors: Mapping[str, Tensor], name: str, spec_hash: str) -> bytes:
    """The bytes of a file of tensors, the same for the same ones.

    Args:
        tensors: what to keep.
        name: what it is called.
        spec_hash: of the run it belongs to.
    """
    contents = {key: value.contiguous().cpu() for key, value in tensors.items()}
    header = {"name": name, "spec_hash": spec_hash, "sha256": checksum(contents)}
    # One entry only: the order of several is not fixed from run to run.
    return to_safetensors(contents, metadata={_HEADER: json.dumps(header)})


def parse_tensors(path: Path, data: bytes, name: str, spec_hash: str) -> dict[str, Tensor]:
    """Read what `dump_tensors` wrote.

    Raises:
        Damaged: it is not that, or belongs elsewhere.
    """
    size = int.from_bytes(data[:8], "little")
    try:
        metadata = parse_json(path, data[8 : 8 + size])["__metadata__"]
        header = (
            parse_json(path, metadata[_HEADER])
            if _HEADER in metadata
            else {"sha256": metadata[_EARLIER_HEADER], "name": name, "spec_hash": spec_hash}
        )
        recorded = header["sha256"]
        owner = header["name"], header["spec_hash"]
        # Old versions of safetensors read onto torch's default device.
        with torch.device("cpu"):
            tensors = from_safetensors(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged({path: f"cannot be read ({error})"}) from None
    if recorded != checksum(tensors):
        raise Damaged({path: "does not match its checksum"})
    if owner != (name, spec_hash):
        raise Damaged({path: f"is {owner[0]} of run {owner[1]}, not {name} of {spec_hash}"})
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, on whatever device: names, dtypes, shapes and contents."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
