"""Processes under measurement: started, waited for, weighed, ended."""

import os
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """A program that ends with the benchmark; what it says goes to `log`."""

    def __init__(self, command, log, environment=None):
        self.log = Path(log)
        with open(self.log, "ab") as file:
            self.child = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=file,
                                          stderr=file, env={**os.environ, **(environment or {})})
        self.pid = self.child.pid

    def check(self):
        """Raises when it has ended by itself."""
        if self.child.poll() is not None:
            end = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.child.args[0]} ended with {self.child.returncode}:\n{end}")

    def children(self):
        """Process ids of its children."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def stop(self):
        """Ends it, gently at first."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def ticks(pids):
    """CPU time that processes have used, in ticks of 10 ms."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    return used


def settle(processes):
    """Waits until none of them computes: llama.cpp's threads spin for a while when there is nothing left to do, on a core
    that the next one to be measured wants."""
    pids = [pid for process in processes for pid in (process.pid, *process.children())]
    before = -1
    while (now := ticks(pids)) != before:
        before = now
        select.select([], [], [], 0.06)


def memory(pids):
    """MiB of processes together: proportional set size (shared pages are shared out) and resident set size."""
    total = {"pss_mib": 0.0, "rss_mib": 0.0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Pss", "Rss"):
                total[f"{name.lower()}_mib"] += int(rest.split()[0]) / 1024
    return {name: round(value, 2) for name, value in total.items()}


def until(done, what, limit=180.0, pause=0.002, process=None):
    """Asks `done` until it says yes; returns when it did."""
    end = time.perf_counter() + limit
    while not done():
        if process:
            process.check()
        if time.perf_counter() > end:
            raise TimeoutError(f"{what}: not within {limit:.0f} s")
        select.select([], [], [], pause)
    return time.perf_counter()


def program(name, *places):
    """Path of a program: in PATH, else the first of `places` that is there."""
    found = shutil.which(name)
    return found or next((place for place in places if os.access(place, os.X_OK)), None)
