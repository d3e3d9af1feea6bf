"""Memory that may be taken: of the machine, and of control groups of both versions."""

import pytest

from recis_lightning.ops import free_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes files of a machine with 8 GiB, 7 of them available."""
    real = free_memory.Path
    (tmp_path / "proc/self").mkdir(parents=True)
    total, left = (size * GIB // 1024 for size in (8, 7))
    meminfo = f"MemTotal: {total} kB\nMemAvailable: {left} kB\nHugePages_Total: 0\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    groups = tmp_path / "groups"
    monkeypatch.setattr(free_memory, "_CGROUPS", groups)
    monkeypatch.setattr(
        free_memory, "Path", lambda path: tmp_path / str(path).lstrip("/")
        if str(path).startswith("/proc") else real(path)
    )  # fmt: skip

    def make(lines, **files):
        (tmp_path / "proc/self/cgroup").write_text(lines)
        for path, content in files.items():
            file = groups / path.replace("__", "/").replace("_AT_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return make


def test_half_of_the_machine_stays_free(machine):
    machine("")
    assert free_memory.memory_left() == 3 * GIB


def test_a_group_of_version_2_counts_without_its_copies_of_files(machine):
    machine(
        "0::/a/b\n",
        a__memory_AT_max=f"{4 * GIB}\n",
        a__memory_AT_current=f"{3 * GIB}\n",
        a__memory_AT_stat=f"anon {GIB}\nfile {2 * GIB}\nshmem {GIB}\n",
        a__b__memory_AT_max="max\n",
        a__b__memory_AT_current="0\n",
        a__b__memory_AT_stat="anon 0\n",
    )
    assert free_memory.memory_left() == 0  # 2 GiB of 4 are left, half of it
    machine("0::/a/b\n", a__memory_AT_current=f"{2 * GIB}\n")
    assert free_memory.memory_left() == GIB


def test_a_group_of_version_1_counts(machine):
    machine(
        "3:cpu:/\n2:cpuset,memory:/job\n",
        memory__job__memory_AT_limit_in_bytes=f"{2 * GIB}\n",
        memory__job__memory_AT_usage_in_bytes=f"{GIB}\n",
        memory__job__memory_AT_stat=f"total_cache {GIB // 2}\ntotal_shmem 0\n",
    )
    assert free_memory.memory_left() == GIB // 2


def test_where_the_system_does_not_say_nothing_may_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "Path", lambda path: tmp_path / "missing")
    assert free_memory.memory_left() == 0
