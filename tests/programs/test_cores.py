"""How many threads a program takes: the affinity, and the CPU quota of a container."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cores
from tests.runs import ROOT, SMALL, arguments, write_text

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has affinities")


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {}, []),
        ("0::/\n", {"cpu.max": "max 100000"}, []),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "cpu.max": "200000 50000"}, [3, 4]),
        ("0::/the/hosts/name\n", {"cpu.max": "200000 100000"}, [2]),
        (
            "9:memory:/m\n4:cpu,cpuacct:/c\n1:name=systemd:/\n",
            {
                "cpu/c/cpu.cfs_quota_us": "50000\n",
                "cpu/c/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/m/cpu.max": "100000 100000",
            },
            [0.5],
        ),
        ("0::/\n", {"cpu.max": "nonsense"}, []),
    ],
)
def test_quotas_of_both_versions_of_control_groups(
    lines: str, files: dict[str, str], expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(lines)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(cores.cpu_quotas()) == expected


@pytest.mark.parametrize(("quotas", "expected"), [([], 8), ([1.5], 2), ([0.5], 1), ([3, 4], 3), ([64], 8)])
def test_threads_are_no_more_than_affinity_and_quota_allow(
    quotas: list[float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "cpu_quotas", lambda: iter(quotas))
    assert cores.usable_cores() == expected


def test_where_there_are_neither_affinities_nor_quotas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "none")
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert cores.usable_cores() == expected


@needs_affinity
def test_on_one_core_a_trainer_takes_one_thread(tmp_path: Path) -> None:
    flags = SMALL | {"--data": write_text(tmp_path), "--run-dir": tmp_path / "run", "--max-steps": 1}
    argv = arguments({name: value for name, value in flags.items() if name != "--threads"})
    core = min(os.sched_getaffinity(0))
    code = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.executable, sys.argv[2:])"
    argv = [sys.executable, "-c", code, str(core), sys.executable, str(ROOT / "train_numpy.py"), *argv]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "computing in 1 thread\n" in done.stdout


def test_nothing_else_counts_cores() -> None:
    """A failure: a program takes as many threads as the machine has cores, whatever it may use of them."""
    counted = [path for path in ROOT.glob("[!.v]*/*.py") if "cpu_count" in path.read_text(encoding="utf-8")]
    counted += [path for path in ROOT.glob("*.py") if "cpu_count" in path.read_text(encoding="utf-8")]
    assert [path.name for path in counted if path.parent.name != "tests"] == ["cores.py"]
