"""What a store says of damaged files, and what it saves."""

import errno
import json
import os

import pytest
from stores import SPEC, UNIT, fill, names, unit_file

from sparse_tickets import files
from sparse_tickets.files import StoreError
from sparse_tickets.sweep.integrity import sha256
from sparse_tickets.sweep.store import Store, load_results
from sparse_tickets.sweep.unit import Unit

FILES = ("rows.parquet", "tickets.safetensors", "manifest.json")


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "folder", "link"])
    def test_damaged_files_are_named_moved_aside_and_redone(self, filled, name, damage):
        file = unit_file(filled, name)
        data = bytearray(file.read_bytes())
        file.unlink()
        if damage == "folder":
            file.mkdir()
        elif damage == "link":
            (filled.path / "copy").write_bytes(data)
            file.symlink_to(filled.path / "copy")
        elif damage != "missing":
            data[len(data) // 2] ^= 4
            file.write_bytes(data if damage == "flipped" else data[:-9])
        with pytest.warns(UserWarning, match=rf"{name} .*will be redone"):
            assert not filled.has(UNIT)
        (line,) = filled.damaged
        assert str(file) in line
        assert names(filled.path / "units") == [f"{UNIT.name}.damaged"]
        assert not filled.has(UNIT)
        fill(filled)
        assert filled.has(UNIT)

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_something_else_in_place_of_a_unit(self, filled, tmp_path, kind):
        unit_file(filled, "").rename(tmp_path / "elsewhere")
        if kind == "file":
            unit_file(filled, "").write_text("x")
        else:
            unit_file(filled, "").symlink_to(tmp_path / "elsewhere")
        with pytest.warns(UserWarning, match=f"{UNIT.name} is not a folder"):
            assert fill(filled)
        assert filled.has(UNIT)
        assert len(names(tmp_path / "elsewhere")) == 3

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', "[" * 200_000])
    def test_damaged_manifest(self, filled, text):
        unit_file(filled, "manifest.json").write_text(text)
        with pytest.warns(UserWarning, match=r"manifest.json is not (a manifest|JSON)"):
            assert not filled.has(UNIT)

    @pytest.mark.parametrize(
        "change",
        [
            {"rows": 3},
            {"inputs": {"demonstrations": "0"}},
            {"unit": "ppo-level-02-chunk-00"},
            {"files": {"../../../secret": {"bytes": 1, "sha256": "0"}}},
        ],
    )
    def test_a_changed_manifest(self, filled, change):
        file = unit_file(filled, "manifest.json")
        content = json.loads(file.read_text()) | change
        file.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match=r"manifest.json does not match its checksum"):
            assert not filled.has(UNIT)

    def test_a_manifest_that_points_outside(self, filled):
        """Signed anew, as by somebody who means it."""
        file = unit_file(filled, "manifest.json")
        content = json.loads(file.read_text())
        content["files"]["../../spec.json"] = content["files"].pop("rows.parquet")
        del content["sha256"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        file.write_text(json.dumps(content | {"sha256": sha256(text.encode())}))
        with pytest.warns(UserWarning, match=r"does not list rows.parquet and tickets.safetensors"):
            assert not filled.has(UNIT)

    def test_files_of_another_unit(self, filled):
        """Level 2's over level 1's, two units swapped, the manifest alone."""
        other = Unit("ppo", 2, 0)
        fill(filled, other)
        here, there = unit_file(filled, ""), unit_file(filled, "", other)
        aside = filled.path / "aside"
        for old, new in ((here, aside), (there, here), (aside, there)):
            old.rename(new)
        with (
            pytest.warns(UserWarning, match="left out: .*belongs to another unit") as told,
            pytest.raises(StoreError, match="no finished unit"),
        ):
            load_results(filled.path)
        assert len(told) == 2
        with pytest.warns(UserWarning, match=f"belongs to another unit .{other.name}"):
            assert not filled.has(UNIT)
        with pytest.warns(UserWarning, match=f"belongs to another unit .{UNIT.name}"):
            assert not filled.has(other)
        fill(filled)
        fill(filled, other)
        manifest = unit_file(filled, "manifest.json", other).read_bytes()
        unit_file(filled, "manifest.json").write_bytes(manifest)
        with pytest.warns(UserWarning, match="belongs to another unit"):
            assert not filled.has(UNIT)
        assert filled.has(other)

    def test_a_unit_of_another_run(self, filled, tmp_path):
        other = Store.open(tmp_path / "other", {"levels": 1})
        unit_file(filled, "").rename(unit_file(other, ""))
        with pytest.warns(UserWarning, match="belongs to another run"):
            assert not other.has(UNIT)

    def test_a_good_unit_moved_aside_by_mistake_goes_back(self, filled, monkeypatch):
        """Another process redoes the damaged unit while this one is about to move it."""
        rows = unit_file(filled, "rows.parquet")
        whole = rows.read_bytes()
        rows.write_bytes(b"x")
        rename = os.rename

        def late(old, new):
            monkeypatch.undo()
            rows.write_bytes(whole)
            rename(old, new)

        monkeypatch.setattr(os, "rename", late)
        with pytest.warns(UserWarning, match=r"rows\.parquet"):
            assert not filled.has(UNIT)
        assert filled.has(UNIT)
        assert names(filled.path / "units") == [UNIT.name]

    def test_reading_a_damaged_unit(self, filled):
        unit_file(filled, "tickets.safetensors").write_bytes(b"x")
        with pytest.warns(UserWarning, match="moved aside"), pytest.raises(StoreError):
            filled.read_tickets(UNIT)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk(self, filled, monkeypatch, code):
        other = Unit("ppo", 4, 0)
        calls = []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) == 3:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(StoreError, match=r"bytes needed.*Finished units are safe"):
            fill(filled, other)
        monkeypatch.undo()
        assert filled.has(UNIT)
        assert not filled.has(other)
        assert not list((filled.path / "units").glob(".*"))
        fill(filled, other)
        assert filled.has(other)

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
    def test_a_folder_that_cannot_be_written(self, filled, monkeypatch, code):
        def refused(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files.os, "fsync", refused)
        with pytest.raises(StoreError, match=r"cannot be written .*make .*units writable"):
            fill(filled, Unit("ppo", 4, 0))
        monkeypatch.undo()
        assert names(filled.path / "units") == [UNIT.name]

    def test_other_errors_keep_their_name(self, store, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, "I/O error")

        monkeypatch.setattr(files.os, "fsync", broken)
        with pytest.raises(OSError, match="I/O error"):
            fill(store)

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
    def test_a_file_system_that_cannot_flush_folders(self, store, monkeypatch, code):
        fsync = os.fsync

        def refuse_folders(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(files.os, "fsync", refuse_folders)
        fill(store)
        assert Store.open(store.path, SPEC).has(UNIT)

    def test_what_reaches_the_disk_when(self, store, monkeypatch):
        """Each file, then the folder that names them, before the rename; what names it, after."""
        fsync, rename = os.fsync, os.rename
        order = []

        def record_fsync(descriptor):
            order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def record_rename(old, new):
            order.append("rename")
            assert os.path.basename(old) == order[-2]
            rename(old, new)

        monkeypatch.setattr(files.os, "fsync", record_fsync)
        monkeypatch.setattr(files.os, "rename", record_rename)
        fill(store)
        assert sorted(order[:3]) == sorted(FILES)
        assert order[4:] == ["rename", "units"]
