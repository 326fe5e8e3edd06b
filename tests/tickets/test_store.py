"""The store: resuming, damage, two processes, full disks and specs that differ."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch

from sparse_tickets import files
from sparse_tickets.files import StoreError
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.sweep import store as store_module
from sparse_tickets.sweep.store import COLUMNS, Store, Unit, load_results, spec_hash
from sparse_tickets.ticket import ROWS, Ticket

SPEC = {"env": "CartPole-v1", "levels": 3, "ppo": {"lr": 2.5e-4, "sizes": (64, 64)}}
UNIT = Unit("ppo", 3, 0)
ARENA = Arena.build((4, 5, 2))


def make_row(seed=0, level=3, condition="mask/weights", **changes):
    row = {
        "env": "CartPole-v1",
        "algo": "ppo",
        "condition": condition,
        "controls": "own",
        "seed": seed,
        "level": level,
        "density": 0.512,
        "effective_density": 0.4,
        "has_path": True,
        "dead_inputs": 0,
        "dead_units": 1,
        "reachable_actions": 2,
        "return_final": 500.0,
        "return_initial": 20.0,
        "return_initial_sampled": 21.0,
        "return_best": 500.0,
        "diverged": False,
        "return_final_sampled": 499.5,
        "return_auc": 0.9,
        "curve": [20.0, 500.0],
        "train_steps": 1000,
        "wall_s": 1.5,
        "random_return": 22.0,
    }
    return {**row, **changes}


def make_tickets(count=2):
    mask = torch.ones(ARENA.prunable, dtype=torch.bool)
    return [
        Ticket.of(
            ARENA,
            mask=mask,
            **{name: torch.randn(ARENA.size) for name in ROWS},
            env="CartPole-v1",
            algo="ppo",
            seed=seed,
            condition="mask/weights",
            controls="own",
            level=3,
        )
        for seed in range(count)
    ]


def fill(store, unit=UNIT, **changes):
    store.write(unit, [make_row(seed, unit.level, **changes) for seed in (1, 0)], make_tickets())


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run", SPEC)


@pytest.fixture
def filled(store):
    fill(store)
    return store


def unit_file(store, suffix, unit=UNIT):
    return store.path / "units" / f"{unit.name}.{suffix}"


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def dead_token():
    """The token of a process that has just ended."""
    code = "from sparse_tickets.files import process_token; print(process_token())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return result.stdout.strip()


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

    def test_overwrite_discards_the_run_only(self, filled):
        (filled.path / "notes.txt").write_text("mine")
        (filled.data / "experts").mkdir()
        (filled.data / "experts" / "one.json").write_text("{}")
        store = Store.open(filled.path, {"levels": 1}, overwrite=True)
        assert names(store.path) == ["data", "notes.txt", "spec.json", "units"]
        assert names(store.data) == names(store.path / "units") == []
        assert store.spec == {"levels": 1}

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

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"spec": {"levels": 9}, "spec_hash": "0"}'])
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
        assert names(store.path / "units") == [
            f"{UNIT.name}.json",
            f"{UNIT.name}.parquet",
            f"{UNIT.name}.safetensors",
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
            store.write(UNIT, [row], make_tickets())
        with pytest.raises(ValueError, match="column 'seed'"):
            store.write(UNIT, [make_row(seed=1.5)], make_tickets())
        with pytest.raises(ValueError, match="column 'curve'"):
            store.write(UNIT, [make_row(curve="high")], make_tickets())
        with pytest.raises(ValueError, match="rows must not be empty"):
            store.write(UNIT, [], make_tickets())
        assert names(store.path / "units") == []

    def test_writing_again_replaces(self, filled):
        fill(filled, return_final=1.0)
        assert filled.has(UNIT)
        assert {row["return_final"] for row in filled.read_rows(UNIT)} == {1.0}


class TestDamage:
    @pytest.mark.parametrize("last", ["parquet", "safetensors"])
    def test_killed_before_the_manifest(self, store, monkeypatch, last):
        write = store_module.write_atomic

        def killed(path, data, needed=None):
            write(path, data, needed)
            if path.suffix == f".{last}":
                raise KeyboardInterrupt

        monkeypatch.setattr(store_module, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(store)
        monkeypatch.undo()
        again = Store.open(store.path, SPEC)
        assert not again.has(UNIT)
        assert again.damaged == []
        fill(again)
        assert again.has(UNIT)

    def test_killed_while_replacing(self, filled, monkeypatch):
        """The old manifest must not vouch for a mixture of old and new files."""
        write = store_module.write_atomic

        def killed(path, data, needed=None):
            if path.suffix == ".safetensors":
                raise KeyboardInterrupt
            write(path, data, needed)

        monkeypatch.setattr(store_module, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(filled, return_final=1.0)
        monkeypatch.undo()
        assert not filled.has(UNIT)
        assert filled.damaged == []

    @pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
    @pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
    def test_damaged_files_are_named_moved_aside_and_redone(self, filled, suffix, damage):
        file = unit_file(filled, suffix)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(data if damage == "flipped" else data[:-9])
        with pytest.warns(UserWarning, match=rf"{UNIT.name}\.{suffix} .*will be redone"):
            assert not filled.has(UNIT)
        assert len(filled.damaged) == 1
        assert file.name in filled.damaged[0]
        assert not file.exists()
        assert file.with_name(file.name + ".damaged").exists() == (damage != "missing")
        assert not filled.has(UNIT)
        fill(filled)
        assert filled.has(UNIT)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}'])
    def test_damaged_manifest(self, filled, text):
        unit_file(filled, "json").write_text(text)
        with pytest.warns(UserWarning, match=r"json is not a manifest"):
            assert not filled.has(UNIT)
        assert unit_file(filled, "json.damaged").exists()

    def test_a_unit_of_another_run(self, filled, tmp_path):
        other = Store.open(tmp_path / "other", {"levels": 1})
        for suffix in ("json", "parquet", "safetensors"):
            unit_file(other, suffix).write_bytes(unit_file(filled, suffix).read_bytes())
        with pytest.warns(UserWarning, match="belongs to another run"):
            assert not other.has(UNIT)

    def test_reading_a_damaged_unit(self, filled):
        unit_file(filled, "safetensors").write_bytes(b"x")
        with pytest.warns(UserWarning, match="moved aside"), pytest.raises(StoreError):
            filled.read_tickets(UNIT)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk(self, filled, monkeypatch, code):
        other = Unit("ppo", 4, 0)
        calls = []

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) == 2:
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

    def test_other_errors_keep_their_name(self, filled, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, "I/O error")

        monkeypatch.setattr(files.os, "fsync", broken)
        with pytest.raises(OSError, match="I/O error"):
            fill(filled)


def hold(path, ready, done):
    with Store(path).claim(UNIT) as mine:
        ready.put(mine)
        done.get()


def work(path, units, results):
    """Write every unit that nobody else writes, as a sweep does."""
    store = Store.open(path, SPEC)
    written = []
    for unit in units:
        with store.claim(unit) as mine:
            if mine and not store.has(unit):
                fill(store, unit)
                written.append(unit)
    results.put((written, store.damaged))


class TestProcesses:
    def test_a_claim_excludes_and_ends(self, store):
        other = Store(store.path)
        with store.claim(UNIT) as mine:
            assert mine
            assert store.claimed_by(UNIT) == files.process_token()
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

    @pytest.mark.parametrize("takeover_left", [False, True])
    def test_the_claim_of_a_dead_process_is_taken_over(self, store, takeover_left):
        lock = unit_file(store, "lock")
        lock.write_text(dead_token())
        if takeover_left:
            takeover = unit_file(store, "lock.takeover")
            takeover.touch()
            with store.claim(UNIT) as mine:
                assert not mine
            os.utime(takeover, (0, 0))
        with store.claim(UNIT) as mine:
            assert mine
        assert names(store.path / "units") == []

    def test_a_reused_pid_does_not_keep_a_claim(self, store):
        pid, _, rest = files.process_token().partition("-")
        host = rest.partition("@")[2]
        unit_file(store, "lock").write_text(f"{pid}-1@{host}")
        with store.claim(UNIT) as mine:
            assert mine
        unit_file(store, "lock").write_text(files.process_token())
        with store.claim(UNIT) as mine:
            assert mine

    def test_claims_of_other_hosts_are_respected(self, store):
        unit_file(store, "lock").write_text("1-1@elsewhere")
        with store.claim(UNIT) as mine:
            assert not mine
        with pytest.raises(StoreError, match=r"claimed by process 1-1@elsewhere.*delete"):
            fill(store)

    def test_a_claim_is_known_again_under_another_host_name(self, store, monkeypatch):
        with store.claim(UNIT) as mine:
            assert mine
            monkeypatch.setattr("socket.gethostname", lambda: "another-network")
            assert store.unknowable_claim(UNIT) is None
        assert store.claimed_by(UNIT) is None

    def test_an_empty_lock_is_respected_for_a_minute(self, store):
        lock = unit_file(store, "lock")
        lock.touch()
        with store.claim(UNIT) as mine:
            assert not mine
        os.utime(lock, (0, 0))
        with store.claim(UNIT) as mine:
            assert mine

    def test_a_live_process_keeps_its_claim_and_a_killed_one_loses_it(self, store):
        context = multiprocessing.get_context("spawn")
        ready, done = context.Queue(), context.Queue()
        process = context.Process(target=hold, args=(store.path, ready, done))
        process.start()
        try:
            assert ready.get(timeout=60)
            with store.claim(UNIT) as mine:
                assert not mine
            with pytest.raises(StoreError, match="is claimed by"):
                fill(store)
            os.kill(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while files.is_alive(store.claimed_by(UNIT)) and time.monotonic() < deadline:
                time.sleep(0.01)
            with store.claim(UNIT) as mine:
                assert mine
        finally:
            process.kill()
            process.join()

    def test_damage_under_a_claim_is_left_to_the_claimer(self, filled):
        unit_file(filled, "parquet").write_bytes(b"half")
        unit_file(filled, "lock").write_text("1-1@elsewhere")
        assert not filled.has(UNIT)
        assert unit_file(filled, "parquet").exists()
        assert filled.damaged == []

    def test_two_processes_share_a_store(self, tmp_path):
        units = [Unit("ppo", level, chunk) for level in range(4) for chunk in range(3)]
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        processes = [
            context.Process(target=work, args=(tmp_path / "run", order, results))
            for order in (units, units[::-1])
        ]
        for process in processes:
            process.start()
        outcome = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        store = Store(tmp_path / "run")
        assert sorted(unit for written, _ in outcome for unit in written) == units
        assert [damaged for _, damaged in outcome] == [[], []]
        assert all(store.has(unit) for unit in units)
        assert len(names(store.path / "units")) == 3 * len(units)

    def test_leftovers_of_dead_processes_are_removed(self, filled):
        dead = filled.path / "units" / f".{dead_token()}~00ff~x.parquet.tmp"
        live = filled.path / "units" / f".{files.process_token()}~00ff~x.parquet.tmp"
        foreign = filled.path / ".config.tmp"
        for file in (dead, live, foreign):
            file.touch()
        Store.open(filled.path, SPEC)
        assert [file.exists() for file in (dead, live, foreign)] == [False, True, True]


class TestResults:
    def test_frame(self, store):
        fill(store, Unit("ppo", 10, 0))
        fill(store, Unit("ppo", 2, 1), condition="random/re-init")
        fill(store, Unit("bc", 2, 0), algo="bc", kl=0.5)
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
        unit_file(store, "parquet").write_bytes(b"x")
        with pytest.warns(UserWarning, match=rf"left out: {UNIT.name}\.parquet"):
            assert set(load_results(store.path)["level"]) == {0}

    def test_nothing_to_load(self, store, tmp_path):
        with pytest.raises(StoreError, match="no finished unit yet"):
            load_results(store.path)
        with pytest.raises(StoreError, match="holds no run"):
            load_results(tmp_path / "nowhere")

    def test_import_is_light(self):
        code = (
            "import sys, sparse_tickets.sweep.store\n"
            "sys.exit(bool({'polars', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
