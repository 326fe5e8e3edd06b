"""CleanRL's programs: the documented lines go in where they belong, and what is written."""

import json
import sys

import pytest
from rich.console import Console

from benchmarks import cleanrl_jobs

DIFF = """\
-import old
+import new
@@
     known()
+    added()
"""


def test_a_diff_changes_what_it_names():
    text = "import old\n\ndef main():\n    known()\n    rest()\n"
    assert cleanrl_jobs.patched(text, DIFF) == (
        "import new\n\ndef main():\n    known()\n    added()\n    rest()\n"
    )
    assert cleanrl_jobs.patched("body\n", "+import more\n") == "import more\nbody\n"
    for other in ("import old\n", text + "    known()\n"):
        with pytest.raises(ValueError, match="must have once"):
            cleanrl_jobs.patched(other, DIFF)


def test_the_docs_have_a_diff_of_three_lines_for_each_script():
    found = cleanrl_jobs.diffs(cleanrl_jobs.DOCS.read_text(encoding="utf-8"))
    assert found.keys() == cleanrl_jobs.SCRIPTS.keys()
    for diff in found.values():
        assert "sparsify_(" in diff
        assert sum(line.startswith("+") for line in diff.splitlines()) <= 3


@pytest.mark.long
def test_each_program_runs_as_it_is_and_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(cleanrl_jobs, "diffs", lambda _: dict.fromkeys(cleanrl_jobs.SCRIPTS, DIFF))
    clone, out, told = tmp_path / "clone", tmp_path / "jobs.json", tmp_path / "told"
    (clone / "cleanrl").mkdir(parents=True)
    for name in cleanrl_jobs.SCRIPTS:
        (clone / "cleanrl" / name).write_text(
            "import sys\n"
            "def added(): print('added', *sys.argv[1:], file=out)\n"
            "def known(): print('known', *sys.argv[1:], file=out)\n"
            f"with open({str(told)!r}, 'a') as out:\n    known()\nold = '''\nimport old\n'''\n"
        )
    console = Console(quiet=True)
    cleanrl_jobs.run_cleanrl(console, clone, sys.executable, 1, (1,), out)
    records = json.loads(out.read_text())
    assert [record["label"] for record in records] == [
        "CleanRL's ppo.py, CartPole-v1",
        "CleanRL's dqn.py, CartPole-v1",
        "CleanRL's sac_continuous_action.py, Pendulum-v1",
    ]
    asked = "--env-id=CartPole-v1 --total-timesteps=100000 --no-cuda"
    assert told.read_text().splitlines()[:3] == [f"known {asked}"] * 2 + [f"added {asked}"]
    assert all(len(s) == 1 for r in records for s in r["runs"][0]["seconds"].values())
    with pytest.raises(ValueError, match="clone must be one of CleanRL"):
        cleanrl_jobs.run_cleanrl(console, tmp_path, out=out)
