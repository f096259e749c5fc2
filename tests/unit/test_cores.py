"""Default slots follow the CPU quota of the container, not the host's cores."""

import os
from pathlib import Path

import pytest

from service import cores
from service.cores import count_cores
from service.settings import Settings


@pytest.fixture(autouse=True)
def _sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_count_usable", lambda: 16)


def _lay_out(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


_V1 = "12:pids:/a/b\n4:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "wanted"),
    [
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0, id="version 2, a container"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16.0, id="version 2, no quota"),
        pytest.param("0::/\n", {}, 16.0, id="version 2, the root cgroup has no file"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5, id="a fraction"),
        pytest.param(
            "0::/pod/container\n",
            {"sys/fs/cgroup/pod/container/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": "400000 100000"},
            4.0,
            id="the quota of a cgroup above",
        ),
        pytest.param(
            "0::/pod/container\n",
            {"sys/fs/cgroup/pod/container/cpu.max": "300000 100000", "sys/fs/cgroup/pod/cpu.max": "800000 100000"},
            3.0,
            id="the smallest of both",
        ),
        pytest.param(
            "0::/../..\n", {"sys/fs/cgroup/cpu.max": "100000 50000"}, 2.0, id="a path outside of the namespace"
        ),
        pytest.param(
            _V1,
            {
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
            },
            2.5,
            id="version 1",
        ),
        pytest.param(
            _V1,
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            4.0,
            id="version 1, the path is the host's",
        ),
        pytest.param(
            _V1,
            {"sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000"},
            16.0,
            id="version 1, no quota",
        ),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000"}, 16.0, id="a quota above the affinity"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "garbage"}, 16.0, id="a file that says nothing"),
    ],
)
def test_the_quota_bounds_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], wanted: float) -> None:
    assert count_cores(_lay_out(tmp_path, cgroup, files)) == wanted


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert count_cores(tmp_path) == 16.0


@pytest.mark.parametrize(("quota", "slots"), [(50_000, 1), (150_000, 1), (400_000, 4), (750_000, 7)])
def test_default_slots_are_one_for_each_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int, slots: int
) -> None:
    root = _lay_out(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    monkeypatch.setattr("service.settings.count_cores", lambda: count_cores(root))
    given = {"kafka_bootstrap": "a:1", "data_url": "postgresql://a", "state_url": "postgresql://b"}
    settings = Settings.model_validate(given | {"results_url": "s3://bucket"})
    assert (settings.slots_interactive, settings.slots_batch) == (slots, slots)


def test_the_affinity_is_read_and_not_the_hosts_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores._count_usable() == 3
