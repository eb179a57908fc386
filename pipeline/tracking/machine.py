"""What the machine of rank 0 is doing, under the names that MLflow's own page for system metrics knows."""

import os
import shutil
import time
from pathlib import Path

from pipeline.tracking.graphics import Graphics

MEGABYTE = 1e6


class Machine:
    """Reads /proc; rates are those since the last reading. Away from Linux it knows the disk only."""

    def __init__(self, folder: Path, *, proc: Path = Path("/proc")) -> None:
        """Begin to count; `folder` says whose disk is meant."""
        self._folder, self._proc = folder, proc
        self._cpu, self._net = self._cpu_ticks(), self._net_bytes()
        self._graphics = Graphics()

    def figures(self) -> dict[str, float]:
        """Return the values by name; takes well under a millisecond."""
        busy, total = self._cpu_ticks()
        received, sent = self._net_bytes()
        (old_busy, old_total), (old_received, old_sent) = self._cpu, self._net
        self._cpu, self._net = (busy, total), (received, sent)
        values = self._memory() | self._graphics.figures()
        if total > old_total:
            values["system/cpu_utilization_percentage"] = 100 * (busy - old_busy) / (total - old_total)
        values["system/network_receive_megabytes"] = (received - old_received) / MEGABYTE
        values["system/network_transmit_megabytes"] = (sent - old_sent) / MEGABYTE
        try:
            disk = shutil.disk_usage(self._folder)
        except OSError:
            return values
        values["system/disk_usage_percentage"] = 100 * disk.used / disk.total
        values["system/disk_available_megabytes"] = disk.free / MEGABYTE
        return values

    def _cpu_ticks(self) -> tuple[int, int]:
        """Return (busy, all) ticks of all cores since the machine started."""
        words = self._read("stat").partition("\n")[0].split()[1:9]
        ticks = [int(word) for word in words]
        return (sum(ticks) - sum(ticks[3:5]), sum(ticks)) if ticks else (0, 0)

    def _net_bytes(self) -> tuple[int, int]:
        """Return bytes (received, sent) over all network devices but the machine's own loop."""
        rows = [line.replace(":", " ").split() for line in self._read("net/dev").splitlines()[2:]]
        others = [row for row in rows if row and row[0] != "lo"]
        return sum(int(row[1]) for row in others), sum(int(row[9]) for row in others)

    def _memory(self) -> dict[str, float]:
        rows = dict(line.split(":", 1) for line in self._read("meminfo").splitlines() if ":" in line)
        values = {}
        if {"MemTotal", "MemAvailable"} <= rows.keys():
            total, free = (1024 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
            values["system/system_memory_usage_megabytes"] = (total - free) / MEGABYTE
            values["system/system_memory_usage_percentage"] = 100 * (total - free) / total
        resident = self._read("self/statm").split()
        if resident:
            pages = os.sysconf("SC_PAGE_SIZE")
            values["system/process_memory_megabytes"] = int(resident[1]) * pages / MEGABYTE
        return values

    def _read(self, name: str) -> str:
        try:
            return (self._proc / name).read_text()
        except OSError:
            return ""


class Watch:
    """Says when so many seconds have passed since it last said so; the first time is at once."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, -float("inf")

    def due(self) -> bool:
        """Return whether it is time again."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
