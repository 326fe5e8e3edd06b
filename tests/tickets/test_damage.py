"""Damage to any file of a run, drawn at random: named and redone, or refused; never used."""

import json
import os
import random
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.files import StoreError
from sparse_tickets.sweep import experts as experts_module
from sparse_tickets.sweep import locks
from sparse_tickets.sweep import run as run_module
from sparse_tickets.sweep.data import checksum, read_data
from sparse_tickets.sweep.integrity import canonical, sha256
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results
from sparse_tickets.sweep.unit import DATA

SPEC = Sweep(
    conditions=("mask/weights", "random/re-init"),
    seeds=2,
    levels=3,
    hidden=(4,),
    rewind_step=64,
    chunk=3,
    ppo=PPO(steps=128, horizon=16),
    bc=BC(experts=1, expert_gate=0.0),
    evaluation=Evaluation(points=1, episodes=1, final_episodes=2),
)
CELL = ["algo", "condition", "controls", "seed", "level"]
LEFT = "ppo-level-02-chunk-01"
"""The unit a dead process was working on."""


def table(out):
    return load_results(out).drop("wall_s", "train_s")


def contents(out):
    """All that a run's folder gives to who reads it; times aside."""
    store = Store(out)
    tickets = {
        unit.name: [
            torch.cat([ticket.mask, ticket.initial, ticket.rewind, ticket.final, ticket.best])
            for ticket in store.read_tickets(unit)
        ]
        for unit in store.units()
    }
    rewind = {unit.name: store.read_rewind(unit) for unit in store.units()}
    data = {name: read_data(store, name) for name in DATA}
    return table(out), tickets, rewind, data


def same(one, other):
    """Whether two values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return checksum({"": one}) == checksum({"": other})
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one.equals(other) if hasattr(one, "equals") else one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, another one, and what is in the first."""
    folder = tmp_path_factory.mktemp("damage")
    run(SPEC, folder / "whole")
    run(replace(SPEC, conditions=("mask/weights", "mask/permuted")), folder / "other")
    return folder, contents(folder / "whole")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "LEASE_S", 0.05)
    for module in (run_module, experts_module):
        monkeypatch.setattr(module, "POLL_S", 0.03)


def files(out):
    return sorted(path for path in out.rglob("*") if path.is_file() and not path.is_symlink())


def flip(path, draw, other):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def scramble(path, draw, other):
    data = bytearray(path.read_bytes())
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.randint(2, 64))
    data[begin:end] = draw.randbytes(end - begin)
    path.write_bytes(data)


def truncate(path, draw, other):
    path.write_bytes(path.read_bytes()[: draw.randrange(1, path.stat().st_size)])


def empty(path, draw, other):
    path.write_bytes(b"")


def extend(path, draw, other):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def zero(path, draw, other):
    """What a file system may leave of a file whose blocks never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(path, draw, other):
    path.unlink()


def folder(path, draw, other):
    path.unlink()
    path.mkdir()


def full_folder(path, draw, other):
    folder(path, draw, other)
    (path / path.name).write_text("x")


def link(path, draw, other):
    """To the very contents: what it leads to may change unseen."""
    aside = path.with_name(f"{path.name}.original")
    path.rename(aside)
    path.symlink_to(aside.absolute())


def dangling_link(path, draw, other):
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path, draw, other):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path, draw, other):
    path.unlink()
    os.mkfifo(path)


def swap_within(path, draw, other):
    """With another file of its kind, or of any, which is returned: it is damaged as well."""
    out = next(parent for parent in path.parents if (parent / "units").is_dir())
    alike = [each for each in files(out) if each != path and each.name == path.name]
    partner = draw.choice(alike or [each for each in files(out) if each != path])
    one, two = path.read_bytes(), partner.read_bytes()
    path.write_bytes(two)
    partner.write_bytes(one)
    return partner


def from_another_run(path, draw, other):
    out = next(parent for parent in path.parents if (parent / "units").is_dir())
    twin = other / path.relative_to(out)
    path.write_bytes(twin.read_bytes() if twin.exists() else draw.choice(files(other)).read_bytes())


def point_outside(path, draw, other):
    """A manifest that lists a file beyond its unit, signed anew as by somebody who means it."""
    content = json.loads(path.read_text())
    del content["sha256"]
    beyond = draw.choice(("../../spec.json", "/etc/hostname", "../../../other/spec.json"))
    name = draw.choice(sorted(content["files"]))
    content["files"][beyond] = content["files"].pop(name)
    path.write_text(json.dumps(content | {"sha256": sha256(canonical(content).encode())}))


# Each acts on a file.
KINDS = (
    flip,
    flip,
    scramble,
    truncate,
    empty,
    extend,
    zero,
    remove,
    folder,
    full_folder,
    link,
    dangling_link,
    link_to_itself,
    pipe,
    swap_within,
    from_another_run,
)


def empty_folder(path, draw, other):
    shutil.rmtree(path)
    path.mkdir()


def remove_folder(path, draw, other):
    shutil.rmtree(path)


def file_for_folder(path, draw, other):
    shutil.rmtree(path)
    path.write_text("x")


def link_for_folder(path, draw, other):
    out = next(parent for parent in path.parents if (parent / "spec.json").exists())
    aside = out / f"{path.name}-elsewhere"
    path.rename(aside)
    path.symlink_to(aside.absolute())


def swap_folders(path, draw, other):
    partner = draw.choice([each for each in path.parent.iterdir() if each.is_dir()])
    aside = path.with_name("aside")
    path.rename(aside)
    if partner != path:
        partner.rename(path)
    aside.rename(partner)


def folder_from_another_run(path, draw, other):
    out = next(parent for parent in path.parents if (parent / "spec.json").exists())
    shutil.rmtree(path)
    shutil.copytree(other / path.relative_to(out), path)


FOLDER_KINDS = (
    empty_folder,
    remove_folder,
    file_for_folder,
    link_for_folder,
    swap_folders,
    folder_from_another_run,
)


# All that a run's folder holds.
TYPES = (
    "spec.json",
    "rows.parquet",
    "tickets.safetensors",
    "rewind.safetensors",
    "manifest.json",
    "experts.safetensors",
    "demonstrations.safetensors",
    "*.lock",
    "folder",
)


def damage(out, other, seed):
    """Damage a file or folder of a run, each type in turn; what was done, and to which two files.

    They are one where no two were swapped.
    """
    draw, what = random.Random(seed), TYPES[seed % len(TYPES)]
    if what == "folder":
        folders = [out / "units", out / "data", *filter(Path.is_dir, (out / "units").iterdir())]
        path, kind = draw.choice(sorted(folders)), draw.choice(FOLDER_KINDS)
    else:
        more = (point_outside,) * 4 if what == "manifest.json" else ()
        path, kind = draw.choice(sorted(out.rglob(what))), draw.choice((*KINDS, *more))
    return kind.__name__, path, kind(path, draw, other) or path


def heard(act, out):
    """What ``act`` gives, None where it refuses, and all that was said."""
    refusal = []
    result = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result = act(out)
        except StoreError as error:
            refusal = [str(error)]
    return result, [str(each.message) for each in told] + refusal


def survives(whole, out, seed):
    """Damage a run, read it, run it, read it again: the case, and how it ended."""
    folder, expected = whole
    frame, tickets, rewind, data = expected
    shutil.copytree(folder / "whole", out)
    shutil.rmtree(out / "units" / LEFT)
    (out / "units" / f"{LEFT}.lock").write_text(f"9@here {locks._machine()} 00 0000000000\n")
    kind, *paths = damage(out, folder / "other", seed)
    path = paths[0]
    case = f"{seed}: {kind} {path.relative_to(out)}"

    # Nothing that is read, before it is redone or after, may be anything else than was written.
    seen, said = heard(table, out)
    if seen is not None:
        assert seen.join(frame, on=CELL, how="anti").is_empty(), case
        assert seen.equals(frame.join(seen.select(CELL), on=CELL, how="semi")), case
    seen, more = heard(contents, out)
    said += more
    if seen is not None:
        assert all(same(each, tickets[name]) for name, each in seen[1].items()), case
        assert all(same(each, rewind[name]) for name, each in seen[2].items()), case
    store, more = heard(lambda out: run(SPEC, out), out)
    said += more
    if store is not None:
        seen, more = heard(contents, out)
        assert not more, (case, more)
        assert same(seen[:3], expected[:3]), case
        for name, each in seen[3].items():
            assert each is None or same(each, data[name]), case
    if not said:
        return case, "nothing lost"
    places = [str(place) for each in paths for place in (each, each.parent)]
    assert any(place in line for place in places for line in said), (case, said)
    if store is not None:
        return case, "redone, by name"
    # Where to go from here: anew, unless what is in the way is not a run's to delete.
    store, more = heard(lambda out: run(SPEC, out, overwrite=True), out)
    if store is None:
        assert any(each.name in line for each in paths for line in more), (case, more)
        return case, "refused by name"
    assert same(contents(out), expected), case
    return case, "refused by name, but overwritten"


def damaged_often(whole, folder, seeds):
    """How many of so many damaged runs ended how."""
    ends = Counter()
    for seed in seeds:
        _, end = survives(whole, folder / "run", seed)
        ends[end] += 1
        shutil.rmtree(folder / "run")
    return ends


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_damage_is_named_and_redone_or_refused(whole, tmp_path):
    assert damaged_often(whole, tmp_path, range(14))["redone, by name"] > 6


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", TYPES)
def test_damage_drawn_500_times_for_each_type_of_file(what, whole, tmp_path):
    first = TYPES.index(what)
    ends = damaged_often(whole, tmp_path, range(first, 500 * len(TYPES), len(TYPES)))
    print(what, dict(ends))
    assert ends.total() == 500
    # A lock says nothing that is needed; a unit's folder that is gone is made again without a word.
    assert what == "*.lock" or ends["nothing lost"] < 200
