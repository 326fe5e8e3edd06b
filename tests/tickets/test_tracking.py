"""Trackers are shown every curve and level as it comes, and cannot stop a sweep."""

import math
import sys
from collections import defaultdict
from dataclasses import replace

import faults
import pytest

from benchmarks.pretended_ray import PretendedRay
from sparse_tickets import load_results, run_sweep
from sparse_tickets.sweep.store import Store

SPEC = replace(
    faults.SPEC,
    algos=("ppo",),
    rewind_step=0,
    evaluation=replace(faults.SPEC.evaluation, points=2),
)
CURVE, SAMPLED = "curve level 01/seed 01", "sampled curve level 01/seed 01"


class Listing:
    """A tracker of one's own: keeps what it is shown, and how many units were stored then."""

    def __init__(self, folder):
        self.folder = folder
        self.shown = defaultdict(list)
        self.stored = defaultdict(set)

    def log(self, track, values, step):
        for name, value in values.items():
            self.shown[track, name].append((step, value))
            self.stored[name].add(len(Store(self.folder).units()))

    def close(self):
        raise AssertionError("a tracker of one's own is one's own to close")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("tracking") / "run"
    tracker = Listing(out)
    run_sweep(SPEC, out, track=tracker)
    return out, tracker


def test_what_is_shown_is_what_the_table_holds(finished):
    out, tracker = finished
    expected = {}
    for row in load_results(out).iter_rows(named=True):
        track = f"{row['algo']} {row['condition']} {row['controls']}"
        level, seed = row["level"], f"seed {row['seed']:02d}"
        for name in ("return_final", "return_final_sampled", "return_initial"):
            expected.setdefault((track, f"{name}/{seed}"), []).append((level, row[name]))
        name = f"effective_density/{seed}"
        expected.setdefault((track, name), []).append((level, row["effective_density"]))
        for name, column in (("curve", "curve"), ("sampled curve", "curve_sampled")):
            points = list(zip((64, 128), row[column], strict=True))
            expected[track, f"{name} level {level:02d}/{seed}"] = points
    assert tracker.shown == expected


def test_curves_are_shown_while_their_unit_is_trained(finished):
    _, tracker = finished
    first = "curve level 00/seed 00"
    assert tracker.stored[first] == {0}
    assert tracker.stored["return_final/seed 00"] >= {1}
    assert tracker.stored[CURVE] < {1, 2, 3}


def test_on_a_cluster_the_same_is_shown(finished, tmp_path):
    tracker = Listing(tmp_path)
    with PretendedRay(cpus=2).installed():
        run_sweep(SPEC, tmp_path, engine="ray", track=tracker)
    assert {name: sorted(shown) for name, shown in tracker.shown.items()} == {
        name: sorted(shown) for name, shown in finished[1].shown.items()
    }


def test_a_tracker_that_fails_does_not_end_the_sweep(finished, tmp_path):
    class Failing(Listing):
        def log(self, track, values, step):
            super().log(track, values, step)
            raise ConnectionError("no route")

    tracker = Failing(tmp_path)
    with pytest.warns(UserWarning, match=r"tracking failed and is given up: .*no route") as said:
        run_sweep(SPEC, tmp_path, track=tracker)
    assert len(said) == 1
    assert sum(map(len, tracker.shown.values())) == 2
    assert faults.contents(tmp_path) == faults.contents(finished[0])


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_how_to_get_it(kind, tmp_path, monkeypatch):
    package = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'sparse-tickets\[{kind}\]'"):
        run_sweep(SPEC, tmp_path / "run", track=kind)
    with pytest.raises(ValueError, match="track must be one of tensorboard, wandb, trackio, got"):
        run_sweep(SPEC, tmp_path / "run", track="paper")
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_it(finished, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_sweep(SPEC, tmp_path, track="tensorboard")
    found = {}
    for folder in (tmp_path / "tracking").iterdir():
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            found[folder.name, tag] = points
    shown = finished[1].shown
    assert found.keys() == {(track.replace("/", "-"), name) for track, name in shown}
    for (track, name), points in shown.items():
        read = found[track.replace("/", "-"), name]
        assert [step for step, _ in read] == [step for step, _ in points]
        for (_, one), (_, other) in zip(read, points, strict=True):
            assert math.isclose(one, other, rel_tol=1e-6), name


def test_weights_and_biases_keeps_it_offline(finished, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_sweep(SPEC, tmp_path, track="wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()
    for track, name in finished[1].shown:
        assert f"{track}/{name}".encode() in written
    assert b"curve level 01/step" in written


def test_trackio_keeps_it(finished, tmp_path, monkeypatch):
    # Read when trackio is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run_sweep(SPEC, tmp_path / "run", track="trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert list((tmp_path / "trackio").iterdir())
    logs = SQLiteStorage.get_logs("sparse-tickets", "run")
    found = defaultdict(list)
    for entry in logs:
        for key, value in entry.items():
            found[key].append((entry["step"], value))
    for (track, name), points in finished[1].shown.items():
        assert sorted(found[f"{track}/{name}"]) == sorted(points), name
