"""A sweep over damaged, foreign and older files, and a full disk."""

import errno
import json
import os
import shutil

import polars as pl
import pytest
import torch
from sweeping import SPEC, table

from sparse_tickets import files
from sparse_tickets.algos import teaching
from sparse_tickets.files import StoreError
from sparse_tickets.sweep import experts as experts_module
from sparse_tickets.sweep.data import checksum, read_data, write_data
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.store import Store, load_results
from sparse_tickets.sweep.unit import Unit


@pytest.mark.parametrize("name", ["rows.parquet", "tickets.safetensors", "manifest.json"])
def test_a_damaged_unit_is_named_and_redone(name, copy, finished):
    folder = copy / "units" / "ppo-level-01-chunk-00"
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{name} .*: moved aside, the unit will be redone"):
        store = run(SPEC, copy)
    assert any(file.name in line for line in store.damaged)
    assert table(copy).equals(table(finished))
    assert folder.with_name(f"{folder.name}.damaged").exists()


@pytest.mark.parametrize("lost", [(), ("units/bc-level-02*",)], ids=["finished", "unfinished"])
@pytest.mark.parametrize("name", ["demonstrations", "experts", "both"])
def test_damaged_demonstrations_are_made_again(name, lost, copy, finished):
    names = ("demonstrations", "experts") if name == "both" else (name,)
    for each in names:
        file = copy / "data" / f"{each}.safetensors"
        # Tensors may be the file itself, mapped into memory.
        before = {key: value.clone() for key, value in read_data(Store(copy), each).items()}
        file.write_bytes(file.read_bytes()[:-4])
    lose(copy, *lost)
    with pytest.warns(UserWarning, match=r"safetensors .*it will be made again"):
        store = run(SPEC, copy)
    assert {line.split()[0] for line in store.damaged} == {
        str(copy / "data" / f"{each}.safetensors") for each in names
    }
    if name != "experts":  # which are needed only to make demonstrations
        again = read_data(Store(copy), names[-1])
        assert all(torch.equal(again[key], before[key]) for key in before)
    assert table(copy).equals(table(finished))


def test_experts_are_not_trained_twice(copy, monkeypatch):
    (copy / "data" / "demonstrations.safetensors").unlink()
    lose(copy, "units/bc-level-02-chunk-00")

    def refuse(*args, **kwargs):
        raise AssertionError("experts were trained again")

    monkeypatch.setattr(experts_module, "make_experts", refuse)
    store = run(SPEC, copy)
    assert read_data(store, "demonstrations")["obs"].shape == (2, 512, 4)
    experts = read_data(store, "experts")
    assert sorted(experts) == ["returns", "seeds", "weight"]
    assert (experts["seeds"] >= 1_000_000).all()


def lose(out, *patterns):
    for pattern in patterns:
        for path in list(out.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def other_demonstrations(out):
    """Put demonstrations in place that another machine's rounding could have made."""
    store = Store(out)
    data = {name: value.clone() for name, value in read_data(store, "demonstrations").items()}
    data["target"][0, 0, 0] += 1e-6
    (out / "data" / "demonstrations.safetensors").unlink()
    assert write_data(store, "demonstrations", data)
    return checksum(data)


def as_before(out, *, inputs=True):
    """Units side by side in one folder, as they once were, with or without demonstrations."""
    for folder in list((out / "units").iterdir()):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = manifest["files"]
        del manifest["sha256"]
        if not inputs:
            del manifest["inputs"]
        manifest["files"] = {
            "parquet": files["rows.parquet"],
            "safetensors": files["tickets.safetensors"],
        }
        for name in ("rows.parquet", "tickets.safetensors"):
            suffix = name.split(".")[1]
            (folder / name).rename(folder.with_name(f"{folder.name}.{suffix}"))
        if "rewind.safetensors" in files:
            name = f"{folder.name}-rewind.safetensors"
            (folder / "rewind.safetensors").rename(out / "data" / name)
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.json").write_text(json.dumps(manifest))


def test_cloning_does_not_go_on_with_other_demonstrations(copy, finished):
    other_demonstrations(copy)
    lose(copy, "units/bc-level-02*")
    before = sorted(file.name for file in (copy / "units").iterdir())
    with pytest.raises(StoreError, match="mixes different demonstrations") as error:
        run(SPEC, copy)
    assert "bc-level-00-chunk-00" in str(error.value)
    assert sorted(file.name for file in (copy / "units").iterdir()) == before
    # The ways out that the message names.
    lose(copy, "units/bc-*", "data/demonstrations*")
    run(SPEC, copy)
    assert table(copy).equals(table(finished))


def test_other_demonstrations_made_anew_are_not_stored(copy, monkeypatch):
    lose(copy, "data/demonstrations*", "units/bc-level-02*")
    make = teaching.demonstrations

    def other_rounding(*args, **kwargs):
        data = make(*args, **kwargs)
        return data._replace(target=data.target + 1e-6)

    monkeypatch.setattr(teaching, "demonstrations", other_rounding)
    with pytest.raises(StoreError, match="mixes different demonstrations"):
        run(SPEC, copy)
    assert not (copy / "data" / "demonstrations.safetensors").exists()
    monkeypatch.undo()
    run(SPEC, copy)


def test_units_of_two_machines_in_one_folder_are_refused(copy, finished, tmp_path):
    """Both ran the whole sweep by the same spec; someone copied one's files over the other's."""
    elsewhere = shutil.copytree(finished, tmp_path / "elsewhere")
    lose(elsewhere, "units/bc-*")
    other_demonstrations(elsewhere)
    run(SPEC, elsewhere)
    lose(copy, "units/bc-level-01-chunk-00")
    unit = "units/bc-level-01-chunk-00"
    shutil.copytree(elsewhere / unit, copy / unit)
    with pytest.raises(StoreError, match="mixes different demonstrations"):
        run(SPEC, copy)
    with pytest.warns(UserWarning, match="mixes different demonstrations"):
        assert len(load_results(copy)) == len(load_results(finished))


def test_folders_from_before_demonstrations_were_recorded(copy, finished):
    as_before(copy, inputs=False)
    run(SPEC, copy)  # Nothing to train, nothing to say.
    assert table(copy).equals(table(finished))
    lose(copy, "units/bc-level-02*")
    with pytest.warns(UserWarning, match="units, bc-level-00-chunk-00 first, .*taken to be those"):
        run(SPEC, copy)
    assert table(copy).equals(table(finished))
    # With the data set gone too nobody can tell.
    lose(copy, "units/bc-level-02*", "data/demonstrations*")
    with pytest.raises(StoreError, match="did not record it: new ones could differ"):
        run(SPEC, copy)
    lose(copy, "units/bc-*")
    run(SPEC, copy)
    assert table(copy).equals(table(finished))


def test_a_damaged_rewind_point_is_made_again(copy, finished):
    unit = "ppo-level-00-chunk-00"
    file = copy / "units" / unit / "rewind.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    lose(copy, "units/ppo-level-02-chunk-00")
    with pytest.warns(UserWarning, match="rewind.safetensors .*the unit will be redone"):
        run(SPEC, copy)
    assert file.read_bytes() == whole
    assert table(copy).equals(table(finished))


def test_folders_of_earlier_versions_are_read_and_go_on(copy, finished):
    as_before(copy)
    lose(copy, "units/*-level-02*")
    assert table(copy).equals(table(finished).filter(pl.col("level") < 2))
    run(SPEC, copy)
    assert table(copy).equals(table(finished))
    file = copy / "data" / "ppo-level-00-chunk-00-rewind.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    (copy / "units" / "ppo-level-01-chunk-00.parquet").write_bytes(b"x")
    with pytest.warns(UserWarning, match="the unit will be redone"):
        store = run(SPEC, copy)
    assert len(store.damaged) == 2
    assert table(copy).equals(table(finished))


@pytest.mark.parametrize("writes", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_a_full_disk_says_what_to_do_and_the_run_resumes(writes, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    left = [writes]
    fsync = os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(StoreError, match="free some space and run the same command again"):
            run(SPEC, out)
    run(SPEC, out)
    assert table(out).equals(table(finished))


def test_data_is_read_as_written_and_damage_is_moved_aside(copy):
    store = Store(copy)
    lose(copy, "data/experts*")
    values = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([True, False])}
    assert write_data(store, "experts", values)
    assert not write_data(store, "experts", {"a": torch.zeros(1)})  # the first stays
    read = read_data(store, "experts")
    assert all(torch.equal(read[key], values[key]) for key in values)
    assert read_data(store, "absent") is None
    file = store.data / "experts.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="does not match its checksum"):
        assert read_data(store, "experts") is None
    assert not file.exists()
    assert read_data(store, "experts") is None


def test_data_of_another_run_or_name_is_not_used(copy):
    store = Store(copy)
    swapped = store.data / "demonstrations.safetensors"
    (store.data / "experts.safetensors").replace(swapped)
    with pytest.warns(UserWarning, match="is experts of run"):
        assert read_data(store, "demonstrations") is None
    store.spec_hash = "another"
    shutil.copy(store.data / "demonstrations.safetensors.damaged", swapped)
    with pytest.warns(UserWarning, match="of run"):
        assert read_data(store, "demonstrations") is None
    assert len(list(store.data.glob("*.damaged*"))) == 2


def test_a_units_files_are_adopted_by_another_copy_of_the_run(finished, tmp_path):
    """As tasks of a cluster return them."""
    store, other = Store(finished), Store.open(tmp_path, SPEC.to_dict())
    unit = Unit("ppo", 0, 0)
    files = store.files(unit)
    assert other.adopt(unit, files)
    assert not other.adopt(unit, files)  # the first stays
    assert other.has(unit)
    assert other.files(unit) == files
    broken = files | {"rows.parquet": files["rows.parquet"][:-1]}
    assert other.adopt(Unit("ppo", 0, 1), broken)
    with pytest.warns(UserWarning, match=r"manifest.json belongs to another unit"):
        assert not other.has(Unit("ppo", 0, 1))
    with pytest.raises(StoreError, match="is not finished"):
        other.files(Unit("ppo", 0, 1))
