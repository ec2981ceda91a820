"""Packs a built program as a Debian package, with dpkg-deb: the same input gives the same bytes."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# GCC's libstdc++ ABI page: the release that brought a version of GLIBCXX.
GCC_OF_GLIBCXX = {"3.4.26": "9", "3.4.27": "9", "3.4.28": "9", "3.4.29": "11", "3.4.30": "12", "3.4.31": "13", "3.4.32": "13.2", "3.4.33": "14"}

CONTROL = """\
Package: pipit
Version: {version}
Architecture: {architecture}
Maintainer: Pipit <pipit@localhost>
Installed-Size: {kib}
Depends: libc6 (>= {libc}), libstdc++6 (>= {gcc}), libgcc-s1, adduser
Recommends: mosquitto
Section: net
Priority: optional
Description: daemon that serves a small language model over MQTT
 Pipit answers prompts that come over MQTT with a language model on this device.
 .
 This package has the kernels of: {board}
 (-march={march}). On a processor that lacks their
 instructions the program says so and ends.
"""

CONFIG = """\
# Pipit on: {board}.
# Every key with its meaning: pipit config generate. What is in force, and who set it: pipit config show --origin.

# The unit's folder, also for who runs `pipit check` or `pipit model` by hand.
state_dir = "/var/lib/pipit"

[broker]
# An MQTT 5 broker: mosquitto on this device, or one of yours: "mqtt://broker.local", "mqtts://broker.local:8883".
url = "mqtt://127.0.0.1:1883"

[model]
# To begin with here: {model} as {quantisation}.
path = "/var/lib/pipit/model.gguf"
n_ctx = {n_ctx}
slots = {slots}
cache_type_k = "{cache_type}"
cache_type_v = "{cache_type}"
{threads}"""

LIMITS = """\
# {board}: what is left of the smallest memory that it is sold with, {mib} MiB, when the system has its share
# (a fifth, at least 128 MiB, at most 1 GiB: assumed). Pipit plans its memory within this limit before it loads a model.
[Service]
MemoryMax={percent}%
"""


def left_of(mib):
    """As Memory::left_of of runtime/src/board.rs, in MiB."""
    return mib - min(max(mib // 5, 128), 1024)


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def package(repository, board, march, architecture, program, libc, libstdcxx, out):
    """Packs `program` for a board's data; returns the path of the package in `out`."""
    version = re.search(r'^version = "(.*)"', (repository / "Cargo.toml").read_text(), re.M).group(1)
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=repository, capture_output=True, text=True
    ).stdout.strip() or "0"
    first, smallest = board["recommended"], board["memory"]["mib"][0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        (root / "usr/bin").mkdir(parents=True)
        shutil.copy2(program, root / "usr/bin/pipit")
        (root / "usr/bin/pipit").chmod(0o755)
        unit = root / "usr/lib/systemd/system/pipit.service"
        write(unit, (repository / "firmware-configs/systemd/pipit.service").read_text())
        percent = left_of(smallest) * 100 // smallest
        limits = LIMITS.format(board=board["name"], mib=smallest, percent=percent)
        write(unit.with_name("pipit.service.d") / "10-board.conf", limits)
        threads = f"threads = {first['threads']}\n" if "threads" in first else ""
        config = CONFIG.format(board=board["name"], **{**first, "threads": threads})
        write(root / "etc/pipit/config.toml", config)
        (root / "etc/pipit/config.d").mkdir()
        doc = root / "usr/share/doc/pipit"
        write(doc / "copyright", "Pipit: MIT or Apache-2.0. llama.cpp, in it: MIT, the ggml authors.\n")
        write(doc / "CHANGELOG.md", (repository / "CHANGELOG.md").read_text())
        kib = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024
        gcc = GCC_OF_GLIBCXX.get(libstdcxx, "12")
        control = CONTROL.format(
            version=version, architecture=architecture, kib=kib, libc=libc, gcc=gcc, board=board["name"], march=march
        )
        write(root / "DEBIAN/control", control)
        write(root / "DEBIAN/conffiles", "/etc/pipit/config.toml\n")
        for script in ("postinst", "prerm", "postrm"):
            write(root / "DEBIAN" / script, (HERE / script).read_text(), 0o755)
        for path in root.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
            os.utime(path, (int(epoch), int(epoch)))
        deb = out / f"pipit_{version}_{architecture}.deb"
        # Without threads and with a given time xz and tar write the same bytes everywhere.
        command = ["dpkg-deb", "--root-owner-group", "--threads-max=1", "-Zxz", "--build", root, deb]
        environment = os.environ | {"SOURCE_DATE_EPOCH": epoch}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return deb
