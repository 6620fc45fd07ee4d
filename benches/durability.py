#!/usr/bin/env python3
"""What making a freshly unpacked layer durable costs: one syncfs(2), or an fsync(2) of every file and directory.

The layers are unpacked by GNU tar, alternately for the one and the other, and only the flush is timed.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)


def syncfs(top):
    fd = os.open(top, os.O_RDONLY)
    if LIBC.syncfs(fd) != 0:
        raise OSError(ctypes.get_errno(), "syncfs", str(top))
    os.close(fd)


def fsync_each(top):
    for directory, _, files in os.walk(top):
        for name in [*files, ""]:
            path = os.path.join(directory, name)
            if not os.path.islink(path) and (os.path.isfile(path) or not name):
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)


def small_files(path, count):
    """A tar of `count` files of 5 KiB in directories of 100."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            entry = tarfile.TarInfo(f"{number // 100}/{number}")
            entry.size = 5120
            tar.addfile(entry, BytesIO(os.urandom(5120)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on the filesystem to measure")
    parser.add_argument("tars", nargs="*", type=Path, help="layer tars besides the made one of 30,000 small files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as work:
        made = Path(work, "30000-small-files.tar")
        small_files(made, 30_000)
        print("| layer | syncfs s | fsync each s | each / syncfs, median (min–max) |\n| --- | --- | --- | --- |")
        for tar in [made, *args.tars]:
            seconds = {syncfs: [], fsync_each: []}
            for turn in range(args.rounds):
                for flush in sorted(seconds, key=lambda f: f.__name__, reverse=bool(turn % 2)):
                    top = Path(work, "layer")
                    top.mkdir()
                    subprocess.run(["tar", "-C", top, "-xf", tar], check=True)
                    start = time.monotonic()
                    flush(top)
                    seconds[flush].append(time.monotonic() - start)
                    shutil.rmtree(top)
                    syncfs(work)
            ratios = [each / one for one, each in zip(seconds[syncfs], seconds[fsync_each])]
            one, each = (statistics.median(seconds[f]) for f in (syncfs, fsync_each))
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            print(f"| {tar.name} | {one:.2f} | {each:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
