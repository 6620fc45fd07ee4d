#!/usr/bin/env python3
"""Times a plain directory, the kernel's overlay, fuse-overlayfs and vfs-fuse on the same work, in turns.

All lie on one ext4 of the run's own, on a loop device in a private mount namespace: nothing of it outlives the run.
Each round runs every side once, in turning order; ratios are taken within a round. See benches/README.md.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from vfs_fuse import report
from vfs_fuse.fixtures import REPOSITORY, Fixtures, fill
from vfs_fuse.rows import COLD, FRESH, OVERLAY, ROWS, UNBOUND, WARM, Job
from vfs_fuse.sides import Failed, Fuse, Mounted, Native, Overlay, drop_caches, remove, run, sync_filesystem

OWN = "vfs-fuse"
STAGE = "GRAPHDRIVER_BENCH_STAGE"
DISK_BYTES = 24 << 30


class Bench:
    def __init__(self, sides, scratch, given):
        self.sides, self.scratch, self.given = sides, scratch, given
        self.helper = str(scratch / "helper")
        run("cc", "-O2", "-o", self.helper, REPOSITORY / "benches/vfs_fuse/helper.c")
        self.tar = str(scratch / "files.tar")
        (scratch / "tree").mkdir()
        fill(scratch / "tree", 5_000)
        run("tar", "-cf", self.tar, "-C", scratch / "tree", ".")
        remove(scratch / "tree")
        device = os.stat(scratch).st_dev
        self.statistics = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        self.results = {}

    def fixture_rows(self, name, rows):
        """All rows of one fixture; the fixture and what was done to it go before the next is made."""
        self.progress(f"making {name}")
        fixtures = Fixtures(self.scratch, self.given.rootless, self.given.cache)
        fixture = fixtures.make(name)
        mounted = {}
        try:
            for side in self.sides:
                self.progress(f"{name}: mounting {side.name}")
                self.attempt(rows, side, lambda: mounted.update({side: Mounted(side, fixture, self.scratch)}))
            self.compare(rows, mounted)
            for row in rows:
                # Rows that bound their rounds take long: --quick has them once.
                bound = 1 if self.given.quick and row.rounds < UNBOUND else row.rounds
                for turn in range(min(self.given.rounds, bound)):
                    for side in self.order(list(mounted), turn):
                        if not self.attempt([row], side, lambda: self.sample(row, turn, mounted[side])):
                            # The daemon may hang or be gone; the rows after this one get another.
                            self.attempt([], side, mounted[side].revive)
        finally:
            for place in mounted.values():
                place.close()
            remove(self.scratch / "fixtures" / name)

    def attempt(self, rows, side, action):
        """Whoever fails is out of the row, by name, and the run ends with 1."""
        if any("failed" in self.results.get(row.name, {}).get(side.name, {}) for row in rows):
            return True
        try:
            action()
            return True
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            for row in rows:
                self.results.setdefault(row.name, {})[side.name] = {"failed": str(error)}
                print(f"vfs_fuse.py: {row.name}: {side.name} FAILED: {error}", file=sys.stderr, flush=True)
            return False

    @staticmethod
    def order(sides, turn):
        shift = turn // 2 % len(sides)
        turned = sides[shift:] + sides[:shift]
        return turned[::-1] if turn % 2 else turned

    def compare(self, rows, mounted):
        """Nobody is timed on a tree that it does not show whole."""
        prints = {}
        for side, place in list(mounted.items()):
            self.attempt(rows, side, lambda: prints.update({side: fingerprint(place.path)}))
            if side not in prints:
                mounted.pop(side).close()
            elif prints[side] != next(iter(prints.values())):
                native = next(iter(prints.values()))
                more, less = prints[side] - native, native - prints[side]
                self.attempt(rows, side, lambda: refuse(f"shows {list(more)[:3]} where native has {list(less)[:3]}"))
                mounted.pop(side).close()

    def sample(self, row, turn, mounted):
        job = Job(mounted, self.helper, self.given.seconds, self.tar)
        self.make_ready(row, turn, job)
        memory = mounted.memory() if row.memory and mounted.process else None
        device, cpu = self.written(), mounted.cpu()
        start = time.perf_counter()
        taken = row.work(job)
        wall = time.perf_counter() - start
        sample = {"seconds": taken}
        if cpu is not None:
            # The daemon's share in the unit of the row, which may be one of very many operations.
            sample["cpu"] = (mounted.cpu() - cpu) * taken / wall
        if row.device:
            sync_filesystem(self.scratch)
            sample |= {"device": self.written() - device, "time": taken}
        if memory:
            sample |= grown(memory, mounted.memory(), int(run("sh", "-c", "find . | wc -l", cwd=mounted.fixture.plain)))
        self.results.setdefault(row.name, {}).setdefault(mounted.side.name, {})[turn] = sample
        self.progress(f"{row.name} {turn + 1}: {mounted.side.name} {report.seconds(taken)}")

    def make_ready(self, row, turn, job):
        if row.state == FRESH:
            job.mounted.fresh()
        row.prepare(job)
        if row.state == FRESH:
            run("find", ".", "-printf", "%s", cwd=job.path)
        if row.state == WARM or (row.state == COLD and turn == 0 and not row.memory):
            row.work(job)
        sync_filesystem(self.scratch)
        if row.state == COLD:
            job.mounted.remount()
            drop_caches()
            for tool in (*row.tools, "true"):
                run(tool, "--version")
            Path(self.helper).read_bytes()

    def written(self):
        return int(self.statistics.read_text().split()[6]) * 512

    @staticmethod
    def progress(message):
        if sys.stderr.isatty():
            print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def refuse(message):
    raise Failed(message)


def fingerprint(path):
    """Every name with its type, mode and owner, and the size of files; a directory's size is each filesystem's own."""
    directory = ["(", "-type", "d", "-printf", "%p %M %U %G;\\n", ")"]
    listing = run("find", ".", *directory, "-o", "-printf", "%p %M %U %G %s %l;\\n", cwd=path)
    return Counter(listing.splitlines())


def grown(before, after, inodes):
    growth = {key: (after[key] - before[key]) / inodes for key in after}
    return {"anonymous": after["anonymous"], "per_inode": growth["anonymous"], "pss_per_inode": growth["pss"]}


def arguments():
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphdriver"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--rows", default="", type=re.compile, metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B", help="these sides, and native")
    own = REPOSITORY / "target/release/vfs-fuse"
    parser.add_argument("--vfs-fuse", default=own, metavar="PATH", help="default: %(default)s")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="another fuse-overlayfs")
    parser.add_argument("--require", action="store_true", help="fail if a program is missing; else it is left out")
    parser.add_argument("--rootless", action="store_true", help="all in a user namespace: no passthrough")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter data rows")
    parser.add_argument("--cache", default=cache, type=Path, help="for the image and the disk (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every sample there")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    given = parser.parse_args()
    if any("=" not in peer for peer in given.peer):
        parser.error("--peer wants NAME=PATH")
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.seconds = 0.2 if given.quick else 0.5
    given.rows = [row for row in ROWS if re.search(given.rows, row.name) and (row.rootless or not given.rootless)]
    if given.rootless:  # that bound is passthrough's
        given.rows = [replace(row, wanted="" if row.wanted == OVERLAY else row.wanted) for row in given.rows]
    if not given.rows:
        parser.error("--rows matches no row (--list shows them)")
    return given


def choose(given):
    """The sides to run, and the names of the fuse-overlayfs among them."""
    peers = {"fuse-overlayfs": "fuse-overlayfs", **dict(peer.split("=", 1) for peer in given.peer)}
    programs = {**peers, OWN: given.vfs_fuse}
    sides, missing = [Native(), Overlay(given.rootless)], []
    for name, program in programs.items():
        if found := shutil.which(program):
            sides.append(Fuse(name, os.path.abspath(found)))
        else:
            missing.append(f"{name} ({program})")
    unknown = set(given.only or []) - set(programs) - {"native", "overlay"}
    if unknown:
        raise SystemExit(f"vfs_fuse.py: --only: no side is called {', '.join(sorted(unknown))}")
    missing = [name for name in missing if not given.only or name.split(" ")[0] in given.only]
    sides = [side for side in sides if not given.only or side.name in ["native", *given.only]]
    return sides, list(peers), missing


def machine(given, sides, missing):
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} × {cpu.partition(':')[2].strip()}, {memory:.0f} GiB, Linux {os.uname().release}",
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "filesystem": "ext4 on a loop device with direct I/O",
        "rounds": str(given.rounds) + (", quick" if given.quick else "") + (", rootless" if given.rootless else ""),
    }
    facts |= {side.name: f"{side.version()} (`{side.program}`)" for side in sides if side.daemon}
    return facts | ({"left out": ", ".join(missing)} if missing else {})


def outside(given):
    """Makes the place and the namespaces, and takes both away again however the run ends."""
    if os.geteuid() != 0:
        raise SystemExit("vfs_fuse.py: needs root, for the loop device and to drop caches (--rootless too)")
    for name in choose(given)[2]:
        print(f"vfs_fuse.py: LEFT OUT: {name}: no such program", file=sys.stderr)
        if given.require:
            raise SystemExit("vfs_fuse.py: --require: build or install it, or name its path")
    given.cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="vfs-fuse-bench-", dir=given.cache.resolve()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    # Whatever is mounted or runs in there ends with the namespaces, and they with this process, even if it is killed.
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *namespaces, sys.executable, *sys.argv],
                               env={**os.environ, STAGE: f"disk:{scratch}"}, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(scratch)


def make_disk(scratch, given):
    """Goes on with `measure`, in a user namespace if asked, once the disk is there."""
    image = scratch / "disk"
    with open(image, "wb") as file:
        file.truncate(DISK_BYTES)
    # Inode tables are written now or never, not by the kernel's thread during the run.
    run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", image)
    device = run("losetup", "--find", "--show", "--direct-io=on", image)
    try:
        image.unlink()  # the loop device has it; so it goes even if this process is killed
        run("mount", "-o", "noinit_itable", device, scratch)
    finally:
        run("losetup", "--detach", device)  # takes effect at the last umount
    os.environ[STAGE] = f"run:{scratch}"
    user = ["unshare", "--user", "--map-root-user", "--mount"] if given.rootless else []
    command = [*user, sys.executable, *sys.argv]
    os.execvp(command[0], command)


def measure(scratch, given):
    sides, peers, missing = choose(given)
    facts = machine(given, sides, missing)
    os.environ |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    bench = Bench(sides, scratch, given)
    start = time.monotonic()
    for fixture in dict.fromkeys(row.fixture for row in given.rows):
        bench.fixture_rows(fixture, [row for row in given.rows if row.fixture == fixture])
        if given.json:  # after each fixture, so that a run broken off leaves what it has
            given.json.write_text(json.dumps({"machine": facts, "results": bench.results}, indent=1) + "\n")
    bench.progress("")
    facts["duration"] = f"{(time.monotonic() - start) / 60:.1f} minutes"
    print(report.whole(facts, given.rows, bench.results, [side.name for side in sides], peers, OWN))
    return any("failed" in samples for per_side in bench.results.values() for samples in per_side.values())


def main():
    given = arguments()
    if given.list:
        for row in given.rows:
            print(f"{row.name:22} {row.state:6} {row.what}")
        return 0
    stage, _, scratch = os.environ.get(STAGE, "").partition(":")
    if stage == "disk":
        make_disk(Path(scratch), given)
    return int(measure(Path(scratch), given) if stage == "run" else outside(given))


if __name__ == "__main__":
    sys.exit(main())
