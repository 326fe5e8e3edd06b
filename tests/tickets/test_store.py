"""The store: resuming, damage, two processes, full disks and specs that differ."""

import json
import os
import subprocess
import sys

import polars as pl
import pytest
import torch
from stores import SPEC, UNIT, fill, make_row, make_tickets, names, unit_file

from sparse_tickets import files
from sparse_tickets.files import StoreError
from sparse_tickets.sweep import locks
from sparse_tickets.sweep.store import COLUMNS, Store, load_results, spec_hash
from sparse_tickets.sweep.unit import Unit


class TestSpec:
    def test_hash_ignores_order_and_tuples(self):
        assert spec_hash({"a": 1, "b": (2, 3)}) == spec_hash({"b": [2, 3], "a": 1})
        assert len(spec_hash(SPEC)) == 12
        assert int(spec_hash(SPEC), 16) >= 0
        assert spec_hash(SPEC) != spec_hash({**SPEC, "levels": 4})

    def test_hash_is_fixed(self):
        """A changed hash would orphan every stored run."""
        assert spec_hash({"env": "CartPole-v1", "levels": 25}) == "16e19c96286e"

    def test_not_json(self):
        with pytest.raises(TypeError):
            spec_hash({"a": object()})
        with pytest.raises(ValueError, match="Out of range"):
            spec_hash({"a": float("nan")})

    def test_folder_of_a_new_run(self, store):
        assert names(store.path) == ["data", "spec.json", "units"]
        content = json.loads((store.path / "spec.json").read_text())
        assert content["spec_hash"] == store.spec_hash == spec_hash(SPEC)
        assert content["spec"] == store.spec == json.loads(json.dumps(SPEC))
        assert store.data == store.path / "data"

    def test_same_spec_resumes(self, filled):
        assert Store.open(filled.path, SPEC).has(UNIT)
        assert Store(filled.path).has(UNIT)

    def test_other_spec_is_refused_by_field(self, filled):
        other = {"env": "Acrobot-v1", "levels": 3, "ppo": {"lr": 1e-3, "clip": 0.2}, "new": None}
        with pytest.raises(StoreError) as caught:
            Store.open(filled.path, other)
        message = str(caught.value)
        assert "env is 'CartPole-v1' there, 'Acrobot-v1' here" in message
        assert "new is absent there, None here" in message
        assert "ppo.clip is absent there, 0.2 here" in message
        assert "ppo.lr is 0.00025 there, 0.001 here" in message
        assert "and 1 more" in message
        assert "--out" in message
        assert "--overwrite" in message
        assert filled.has(UNIT)

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            (None, "does not say which columns"),
            (sorted({*COLUMNS, "old"} - {"diverged"}), "lack diverged and have old"),
        ],
    )
    def test_a_run_with_other_columns_is_read_but_not_gone_on_with(self, filled, columns, said):
        file = filled.path / "spec.json"
        content = json.loads(file.read_text())
        assert content.pop("columns") == list(COLUMNS)
        file.write_text(json.dumps(content if columns is None else {**content, "columns": columns}))
        with pytest.raises(StoreError, match=said) as caught:
            Store.open(filled.path, SPEC)
        for way_out in ("--out", "--overwrite", "report"):
            assert way_out in str(caught.value)
        assert len(load_results(filled.path)) == 2
        Store.open(filled.path, SPEC, overwrite=True)
        assert json.loads(file.read_text())["columns"] == list(COLUMNS)

    def test_overwrite_discards_the_run_only(self, filled):
        """Names that a run gives, and nothing else."""
        fill(filled, Unit("ppo", 0, 0))
        own = filled.path / "units" / "ppo-level-00-chunk-00"
        mine = [
            filled.path / "notes.txt",
            filled.path / "units" / "notes.txt",
            filled.data / "thesis.safetensors",
            filled.data / "experts" / "one.json",
            own / "notes.txt",
        ]
        for file in mine:
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine")
        for name in ("experts", "demonstrations"):
            (filled.data / f"{name}.safetensors").write_text("x")
            (filled.data / f"{name}.safetensors.damaged-2").write_text("x")
        for earlier in ("json", "parquet", "safetensors", "json.damaged"):
            (filled.path / "units" / f"ppo-level-01-chunk-00.{earlier}").write_text("x")
        store = Store.open(filled.path, {"levels": 1}, overwrite=True)
        left = sorted(file for file in store.path.rglob("*") if file.is_file())
        assert left == sorted([*mine, store.path / "spec.json"])
        assert store.spec == {"levels": 1}

    @pytest.mark.parametrize("sub", ["data", "units"])
    def test_overwrite_deletes_nothing_through_a_link(self, filled, tmp_path, sub):
        elsewhere = tmp_path / "elsewhere"
        (filled.path / sub).rename(elsewhere)
        (elsewhere / "experts.safetensors").write_text("of another run")
        (filled.path / sub).symlink_to(elsewhere)
        before = sorted(elsewhere.rglob("*"))
        with pytest.raises(StoreError, match=rf"{sub} is a link.*remove the link"):
            Store.open(filled.path, SPEC, overwrite=True)
        assert sorted(elsewhere.rglob("*")) == before

    def test_overwrite_deletes_a_link_but_not_what_it_leads_to(self, filled, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        unit_file(filled, "").rename(elsewhere)
        unit_file(filled, "").symlink_to(elsewhere)
        Store.open(filled.path, SPEC, overwrite=True)
        assert names(filled.path / "units") == []
        assert len(names(elsewhere)) == 3

    def test_overwrite_waits_for_nobody_at_work(self, filled):
        with (
            filled.claim(UNIT),
            pytest.raises(StoreError, match=r"is working in .*stop it before --overwrite"),
        ):
            Store.open(filled.path, SPEC, overwrite=True)
        assert filled.has(UNIT)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_something_else_is_left_alone(self, tmp_path, overwrite):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "thesis.tex").write_text("x")
        with pytest.raises(StoreError, match=r"not known to be a run's"):
            Store.open(tmp_path, SPEC, overwrite=overwrite)
        (tmp_path / "spec.json").write_text('{"other": "tool"}')
        with pytest.raises(StoreError, match=r"spec\.json"):
            Store.open(tmp_path, SPEC, overwrite=overwrite)
        assert (tmp_path / "data" / "thesis.tex").exists()

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "[" * 200_000, '{"spec": {"levels": 9}, "spec_hash": "0"}']
    )
    def test_damaged_spec(self, filled, text):
        (filled.path / "spec.json").write_text(text)
        with pytest.raises(StoreError, match=r"spec\.json is damaged"):
            Store.open(filled.path, SPEC)

    def test_no_run(self, tmp_path):
        with pytest.raises(StoreError, match="holds no run"):
            Store(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(StoreError, match="is a file"):
            Store.open(tmp_path / "file", SPEC)


class TestUnits:
    def test_names(self):
        assert Unit("bc_replay", 7, 12).name == "bc_replay-level-07-chunk-12"
        for algo in ("", "a/b", "../x", ".x"):
            with pytest.raises(ValueError, match="algo"):
                Unit(algo, 0, 0)
        with pytest.raises(ValueError, match="level and chunk"):
            Unit("ppo", -1, 0)

    def test_round_trip(self, store):
        tickets = make_tickets()
        rows = [make_row(seed, note="kept", entropy=0.5) for seed in range(2)]
        assert not store.has(UNIT)
        store.write(UNIT, rows, tickets)
        assert store.has(UNIT)
        assert store.units() == [UNIT]
        assert store.read_rows(UNIT) == rows
        for one, other in zip(tickets, store.read_tickets(UNIT), strict=True):
            assert torch.equal(one.final, other.final)
        assert names(store.path / "units") == [UNIT.name]
        assert names(unit_file(store, "")) == [
            "manifest.json",
            "rows.parquet",
            "tickets.safetensors",
        ]

    def test_reading_what_is_not_finished(self, store):
        with pytest.raises(StoreError, match="ppo-level-03-chunk-00 is not finished"):
            store.read_rows(UNIT)
        with pytest.raises(StoreError, match="is not finished"):
            store.read_tickets(UNIT)

    def test_rows_are_checked(self, store):
        row = make_row()
        del row["has_path"], row["curve"]
        with pytest.raises(ValueError, match="missing curve, has_path"):
            store.write(UNIT, [row], make_tickets(count=1))
        with pytest.raises(ValueError, match="column 'seed'"):
            store.write(UNIT, [make_row(seed=1.5)], make_tickets(count=1))
        with pytest.raises(ValueError, match="column 'curve'"):
            store.write(UNIT, [make_row(curve="high")], make_tickets(count=1))
        with pytest.raises(ValueError, match="rows must not be empty"):
            store.write(UNIT, [], [])
        with pytest.raises(ValueError, match="one per ticket, got 1 and 2"):
            store.write(UNIT, [make_row()], make_tickets())
        with pytest.raises(ValueError, match=f"must be of {UNIT.name}"):
            store.write(UNIT, [make_row(level=2)], make_tickets(count=1))
        with pytest.raises(ValueError, match=f"must be of {UNIT.name}"):
            store.write(UNIT, [make_row()], make_tickets(Unit("bc", 3, 0), count=1))
        assert names(store.path / "units") == []

    def test_the_first_result_stays(self, filled):
        """Of two processes with the same unit the second counts for nothing."""
        before = unit_file(filled, "rows.parquet").read_bytes()
        assert not fill(filled, return_final=1.0)
        assert unit_file(filled, "rows.parquet").read_bytes() == before
        assert names(filled.path / "units") == [UNIT.name]

    def test_a_rewind_point_belongs_to_its_unit(self, store):
        dense = Unit("ppo", 0, 0)
        values = {"weight": torch.randn(2, 3), "step": torch.tensor([4, 4])}
        rows = [make_row(seed, 0) for seed in range(2)]
        store.write(dense, rows, make_tickets(dense), rewind=values)
        read = store.read_rewind(dense)
        assert all(torch.equal(read[key], values[key]) for key in values)
        fill(store)
        assert store.read_rewind(UNIT) is None


class TestProcesses:
    def test_a_claim_excludes_and_ends(self, store):
        other = Store(store.path)
        with store.claim(UNIT) as mine:
            assert mine
            assert store.claimed_by(UNIT).startswith(f"process {os.getpid()} on ")
            with other.claim(UNIT) as second:
                assert not second
            with other.claim(Unit("bc", 3, 0)) as third:
                assert third
        assert store.claimed_by(UNIT) is None
        assert names(store.path / "units") == []

    def test_a_claim_ends_with_an_error(self, store):
        with pytest.raises(KeyError), store.claim(UNIT):
            raise KeyError
        assert store.claimed_by(UNIT) is None

    def test_leftovers_are_removed_by_who_claims_the_unit(self, filled):
        units = filled.path / "units"
        for unit in (UNIT, Unit("ppo", 4, 0)):
            (units / f".{unit.name}~00ff.tmp").mkdir()
            (units / f".{unit.name}~00ff.tmp" / "rows.parquet").touch()
        (units / ".config.tmp").touch()
        with filled.claim(UNIT):
            pass
        assert names(units) == [".config.tmp", ".ppo-level-04-chunk-00~00ff.tmp", UNIT.name]

    def test_leftovers_of_who_dies_later_are_removed_by_who_takes_over(self, filled):
        units = filled.path / "units"
        with filled.claim(Unit("ppo", 4, 0)):
            pass
        (units / f".{UNIT.name}~00ff.tmp").mkdir()
        (units / f"{UNIT.name}.lock").write_text(f"9@here {locks._machine()} 00 0000000000\n")
        with filled.claim(UNIT) as mine:
            assert mine
        assert names(units) == [UNIT.name]

    def test_claims_do_not_list_the_folder_again_and_again(self, store, monkeypatch):
        """Else a run of many units would take their square."""
        listed = []
        scandir = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
        for chunk in range(20):
            with store.claim(Unit("ppo", 3, chunk)):
                pass
        assert len(listed) == 1

    def test_what_units_were_trained_on_is_read_once(self, filled, monkeypatch):
        """However often it is asked: for every unit that is trained, of all that are."""
        read = []
        manifest = Store._manifest
        monkeypatch.setattr(Store, "_manifest", lambda *given: read.append(1) or manifest(*given))
        store = Store(filled.path)
        for _ in range(5):
            assert store.check_inputs(UNIT.algo, "demonstrations") == [UNIT]
        assert len(read) == 1
        # One that was damaged meanwhile is made again, and asked again.
        unit_file(filled, "manifest.json").write_text("{}")
        with pytest.warns(UserWarning, match="will be redone"):
            assert not store.has(UNIT)
        assert store.inputs(UNIT) is None

    def test_a_writer_held_for_dead_begins_again(self, store, monkeypatch):
        """Its files were removed by who took its claim over, who then died too."""
        write = files._write_synced

        def swept(path, data):
            monkeypatch.undo()
            found = files.leftovers(store.path / "units")[UNIT.name]
            files.remove_leftovers(found)
            write(path, data)

        monkeypatch.setattr(files, "_write_synced", swept)
        assert fill(store)
        assert store.has(UNIT)


class TestResults:
    def test_frame(self, store):
        fill(store, Unit("ppo", 10, 0))
        fill(store, Unit("ppo", 2, 1), condition="random/re-init")
        fill(store, Unit("bc", 2, 0), kl=0.5)
        frame = load_results(store.path)
        assert frame.columns == [*COLUMNS, "kl"]
        assert frame.select("algo", "condition", "seed", "level").rows() == [
            ("bc", "mask/weights", 0, 2),
            ("bc", "mask/weights", 1, 2),
            ("ppo", "mask/weights", 0, 10),
            ("ppo", "mask/weights", 1, 10),
            ("ppo", "random/re-init", 0, 2),
            ("ppo", "random/re-init", 1, 2),
        ]
        assert frame.schema["curve"] == pl.List(pl.Float64)
        assert frame.schema["has_path"] == pl.Boolean
        assert frame.schema["seed"] == pl.Int64
        assert frame["curve"][0].to_list() == [20.0, 500.0]

    def test_all_missing_values_keep_their_type(self, store):
        fill(store, return_best=None, curve=[])
        frame = load_results(store.path)
        assert frame.schema["return_best"] == pl.Float64
        assert frame["return_best"].null_count() == 2

    def test_damaged_units_are_left_out_by_name(self, store):
        fill(store, Unit("ppo", 0, 0))
        fill(store)
        unit_file(store, "rows.parquet").write_bytes(b"x")
        with pytest.warns(UserWarning, match=rf"left out: .*{UNIT.name}/rows\.parquet"):
            assert set(load_results(store.path)["level"]) == {0}

    def test_nothing_to_load(self, store, tmp_path):
        with pytest.raises(StoreError, match="no finished unit yet"):
            load_results(store.path)
        with pytest.raises(StoreError, match="holds no run"):
            load_results(tmp_path / "nowhere")

    @pytest.mark.long
    def test_import_is_light(self):
        code = (
            "import sys, sparse_tickets.sweep.store\n"
            "sys.exit(bool({'polars', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
