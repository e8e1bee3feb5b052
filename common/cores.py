"""How many threads pay: the cores that this process may use, which may be fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # lines like "0::/a/b" in version 2, "4:cpu,cpuacct:/a/b" in version 1


def usable_cores() -> int:
    """The cores that taskset or a batch system leaves to this process, or the container's CPU quota if that is less."""
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in cpu_quotas())]))


def cpu_quotas() -> Iterator[float]:
    """CPU seconds in each second that Linux's control groups allow: this process's own group, and all around it."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / "cpu" if controllers else CGROUPS
        own = root / group.strip("/")
        # Inside a container the group may be named as the host sees it: then only the root is there.
        for folder in [own, *own.parents][: len(own.relative_to(root).parts) + 1]:
            try:
                if controllers:
                    quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
                    period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
                else:
                    quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
                seconds = int(quota) / int(period)
            except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
                continue
            if seconds > 0:  # -1: no limit
                yield seconds
