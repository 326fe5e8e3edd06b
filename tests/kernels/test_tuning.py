"""Measured configurations: which entry counts, what stands for no entry, and what is refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.launch import Launch
from sparse_tickets.kernels.tuning import configuration, configuration_file, override, shape_class

CUDA = torch.device("cuda", 0)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes the file of the only GPU, which is a made-up one."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(tuning, "_device_name", lambda index: "NVIDIA Test (80GB)")
    tuning.forget()

    def write(configurations, layout=tuning.LAYOUT):
        data = {"layout": layout, "configurations": configurations}
        configuration_file("NVIDIA Test (80GB)").write_text(json.dumps(data))
        tuning.forget()

    yield write
    tuning.forget()


def test_sizes_round_up_to_powers_of_two_and_names_stay():
    name = shape_class(rows=100, cols=64, empty=0, masked=False, dtype=torch.float32)
    assert name == "cols=64 dtype=float32 empty=1 masked=False rows=128"
    assert shape_class(b=1, a=2) == shape_class(a=2, b=1)
    with pytest.raises(ValueError, match="rows must not be negative, got -1"):
        shape_class(rows=-1)


def test_without_a_file_or_an_entry_the_op_decides(written):
    assert configuration("linear", "rows=64", CUDA) is None
    written({"linear": {"rows=64": {"warps": 4}, "rows=128": {}}})
    assert configuration("linear", "rows=128", CUDA) is None
    assert configuration("linear", "rows=32", CUDA) is None
    assert configuration("other", "rows=64", CUDA) is None
    assert configuration("linear", "rows=64", torch.device("cpu")) is None


def tiles(rows, warps):
    return Launch(rows=rows, warps=warps)


def test_a_measured_configuration_is_preferred_field_by_field(written):
    default = tiles(64, 4)
    assert tuning.prefer(default, "op", CUDA, n=100) is default
    written({"op": {"n=128": {"warps": 8}, "n=256": {"cols": 8}}})
    assert tuning.prefer(default, "op", CUDA, n=100) == tiles(64, 8)
    assert tuning.prefer(default, "op", CUDA, n=64) is default
    with pytest.raises(ValueError, match="configuration of 'op' for 'n=256' does not fit"):
        tuning.prefer(default, "op", CUDA, n=256)


def test_only_a_launch_that_the_op_knows_counts(written):
    default, other = tiles(64, 4), tiles(64, 8)
    written({"op": {"n=128": {"warps": 8}, "n=256": {"warps": 2}}})
    among = (default, other)
    assert tuning.prefer(default, "op", CUDA, among=among, n=100) == other
    allowed = "must be one of .*warps=4.*; .*warps=8.*; got .*warps=2"
    with pytest.raises(ValueError, match=rf"configuration of 'op' for 'n=256' {allowed}"):
        tuning.prefer(default, "op", CUDA, among=among, n=256)


def test_a_candidate_is_tried_on_its_own_op_and_shapes_in_every_thread():
    default, cpu = tiles(64, 4), torch.device("cpu")

    def ask(op, kind):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(tuning.prefer, default, op, cpu, kind=kind).result()

    with override("op", "kind=x", {"warps": 16}):
        assert ask("op", "x") == tiles(64, 16)
        assert ask("op", "y") is default
        assert ask("other", "x") is default
        with override("op", "kind=x", {"warps": 2}):
            assert ask("op", "x") == tiles(64, 2)
        assert ask("op", "x") == tiles(64, 16)
    assert ask("op", "x") is default


def test_questions_are_heard_from_every_thread():
    default = tiles(64, 4)
    with tuning.listen() as heard, ThreadPoolExecutor(1) as pool:
        pool.submit(tuning.prefer, default, "op", torch.device("cpu"), n=3).result()
    assert heard == [tuning.Question("op", "n=4", default, ())]
    tuning.prefer(default, "op", torch.device("cpu"))
    assert len(heard) == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"layout": 9, "configurations": {}}',
     '{"layout": 1, "configurations": {"op": {"x": {"dense": {"warps": 1}}}}}',
     '{"layout": 1, "configurations": {"op": {"x": {"warps": "many"}}}}'],
)  # fmt: skip
def test_a_damaged_file_is_named_not_skipped(written, content):
    path = configuration_file("NVIDIA Test (80GB)")
    path.write_text(content)
    tuning.forget()
    with pytest.raises(ValueError, match=rf"{path.name} is not a file of configurations"):
        configuration("op", "x", CUDA)


def test_shipped_files_can_be_read():
    for path in tuning.CONFIGS.glob("*.json"):
        assert tuning.read(path)


def test_answers_are_copies(written):
    written({"op": {"x": {"warps": 8}}})
    answer = configuration("op", "x", CUDA)
    answer["warps"] = 1
    assert configuration("op", "x", CUDA) == {"warps": 8}
