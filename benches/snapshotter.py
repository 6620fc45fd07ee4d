#!/usr/bin/env python3
"""Times `graphdriver snapshotter` beside containerd's own snapshotters: see benches/README.md.

One containerd has its overlayfs, native and btrfs snapshotters and, as proxies, graphdriver's overlay2, vfs-fuse,
btrfs, devicemapper and zfs. What is compared lies on the same loop device. Each round asks every snapshotter once, in
turning order.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import REPOSITORY, Bench, machine, run, spread, sync_filesystem, timed

# Each with the filesystem it lies on and the built-in one it is measured by.
SNAPSHOTTERS = {
    "overlayfs": ("ext4", None),
    "native": ("ext4", None),
    "gd-overlay2": ("ext4", "overlayfs"),
    "gd-vfs-fuse": ("ext4", "overlayfs"),
    "btrfs": ("btrfs", None),
    "gd-btrfs": ("btrfs", "btrfs"),
    "gd-devicemapper": ("ext4", "overlayfs"),
    "gd-zfs": ("ext4", "overlayfs"),
}
# Not every kernel has these.
DEFAULT = [name for name in SNAPSHOTTERS if name not in ("gd-devicemapper", "gd-zfs")]
CASES = ("cycle", "stack", "import", "usage", "list")
# Nothing is left for the kernel to do in the background.
MKFS = {"ext4": ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"], "btrfs": ["mkfs.btrfs", "-q"]}


def proxies(names):
    return [name for name in names if name.startswith("gd-")]


class World:
    """containerd and the services, on two disks of their own. Everything dies with the namespaces this runs in."""

    def __init__(self, scratch, given):
        self.scratch, self.given, self.processes = scratch, given, []
        kinds = {"ext4", *(SNAPSHOTTERS[name][0] for name in given.snapshotters)}
        self.disks = {kind: self.disk(kind) for kind in MKFS if kind in kinds}
        for name in proxies(given.snapshotters):
            self.serve(name)
        self.containerd()

    def disk(self, kind):
        image, target = self.scratch / f"{kind}.img", self.scratch / kind
        with open(image, "wb") as file:
            file.truncate(self.given.disk << 30)
        counted = kind == "ext4" and self.given.pquota
        run(*MKFS[kind], *(["-O", "project,quota", "-E", "quotatype=prjquota"] if counted else []), image)
        target.mkdir()
        run("mount", "-o", "loop,prjquota" if counted else "loop", image, target)
        if kind == "btrfs" and self.given.qgroups:
            run("btrfs", "quota", "enable", target)
        return target

    def start(self, name, command, environment=None):
        with open(self.scratch / f"{name}.log", "ab") as log:
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=environment)
        self.processes.append((name, process))
        return process

    def serve(self, name):
        disk = self.disks[SNAPSHOTTERS[name][0]]
        config = self.scratch / "graphdriver.json"
        config.write_text("{}")
        words = ["--root", disk / name, "--storage-driver", name.removeprefix("gd-")]
        words += [word for option in self.options(name, disk) for word in ("--storage-opt", option)]
        command = [self.given.graphdriver, *words, "snapshotter", "--socket", self.socket(name)]
        self.start(name, command, {**os.environ, "GRAPHDRIVER_CONFIG": str(config)})
        self.wait(name, lambda: self.socket(name).is_socket())

    def options(self, name, disk):
        if name == "gd-devicemapper":
            size = f"{self.given.disk * 3 // 4}G"
            return [f"dm.basesize={size}", f"dm.loopdatasize={size}", "dm.loopmetadatasize=128M"]
        if name == "gd-zfs":
            with open(disk / "pool.img", "wb") as file:
                file.truncate(self.given.disk << 30)
            properties = ["-o", "cachefile=none", "-O", "mountpoint=none"]
            # ZFS opens files by their paths outside of this mount namespace.
            device = run("losetup", "--find", "--show", disk / "pool.img")
            run("zpool", "create", "-f", *properties, pool(self.scratch), device)
            run("losetup", "--detach", device)
            return [f"zfs.fsname={pool(self.scratch)}"]
        return []

    def socket(self, name):
        return self.scratch / f"{name}.sock"

    def containerd(self):
        root = self.disks["ext4"]
        config = [
            f'version = 2\nroot = "{root}/containerd"\nstate = "{self.scratch}/state"',
            'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]',
            f'[grpc]\naddress = "{self.socket("containerd")}"',
        ]
        if "btrfs" in self.disks:
            place = f'root_path = "{self.disks["btrfs"]}/containerd"'
            config.append(f'[plugins."io.containerd.snapshotter.v1.btrfs"]\n{place}')
        for name in proxies(self.given.snapshotters):
            config.append(f'[proxy_plugins.{name}]\ntype = "snapshot"\naddress = "{self.socket(name)}"')
        path = self.scratch / "config.toml"
        path.write_text("\n".join(config) + "\n")
        self.start("containerd", ["containerd", "--config", path])
        self.wait("containerd", lambda: subprocess.run(self.ctr("version"), capture_output=True).returncode == 0)

    def wait(self, name, ready):
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline or self.processes[-1][1].poll() is not None:
                raise SystemExit(f"snapshotter.py: {name} did not start:\n{(self.scratch / f'{name}.log').read_text()}")
            time.sleep(0.05)

    def stop(self):
        for _, process in reversed(self.processes):
            process.terminate()
        for _, process in self.processes:
            process.wait()
        let_go(self.scratch)
        for disk in self.disks.values():
            run("umount", "--recursive", disk)

    def ctr(self, *words):
        return ["ctr", "--address", str(self.socket("containerd")), "--namespace", "bench", *map(str, words)]

    def calls(self, name, *words, direct=False):
        """Through containerd, or on the socket of our service."""
        address = self.socket(name if direct else "containerd")
        client = [self.given.calls, "--address", address, "--snapshotter", name]
        return json.loads(run(*client, *words))

    def collect(self):
        """Lets containerd's garbage collector free what was removed, and waits for it."""
        run(*self.ctr("leases", "create", "--id", "collect"))
        run(*self.ctr("leases", "delete", "--sync", "collect"))

    def empty(self, name, direct=False):
        self.calls(name, "clear", direct=direct)
        self.calls(name, "cleanup", direct=True) if direct else self.collect()

    def settle(self):
        for disk in self.disks.values():
            sync_filesystem(disk)


def pool(scratch):
    return f"bench-{scratch.name}"


def let_go(scratch):
    """Pool and devices, which outlive a mount namespace."""
    for tree in scratch.glob("many-*"):
        subprocess.run(["umount", tree], capture_output=True)
    if shutil.which("zpool") and pool(scratch) in run("zpool", "list", "-H", "-o", "name").splitlines():
        subprocess.run(["zpool", "destroy", "-f", pool(scratch)])
    state = scratch / "ext4/gd-devicemapper/devicemapper/data/pool.json"
    if state.exists():
        prefix = f"graphdriver-{json.loads(state.read_text())['id']}-"
        names = [line.split()[0] for line in run("dmsetup", "ls").splitlines() if line.startswith(prefix)]
        for name in sorted(names, key=lambda name: name.endswith("-pool")):
            subprocess.run(["dmsetup", "remove", "--retry", name])


class Cases:
    """What is measured; samples are {case: {column: {snapshotter: [seconds, …]}}}."""

    def __init__(self, world, given):
        self.world, self.given, self.samples = world, given, {}

    def add(self, case, column, name, seconds):
        self.samples.setdefault(case, {}).setdefault(column, {}).setdefault(name, []).append(seconds)

    def rounds(self, case, names=None):
        names = list(names or self.given.snapshotters)
        for number in range(self.given.rounds):
            for name in Bench.order(None, names, number):
                print(f"{case} {number + 1}: {name}", file=sys.stderr, flush=True)
                self.world.settle()
                yield name

    def cycle(self):
        for clients in (1, 16):
            for name in self.rounds(f"cycle, {clients} at once"):
                self.one_cycle(name, clients, False)
            for name in self.rounds(f"cycle, {clients} at once, alone", proxies(self.given.snapshotters)):
                self.one_cycle(name, clients, True)

    def one_cycle(self, name, clients, direct):
        done = self.world.calls(name, "cycle", "--count", self.given.count, "--clients", clients, direct=direct)
        # Removed is what has been freed: containerd's collector is part of the work, wherever it runs.
        begun = time.monotonic()
        self.world.calls(name, "cleanup", direct=True) if direct else self.world.collect()
        where = " on our socket" if direct else ""
        each = (done["seconds"] + time.monotonic() - begun) / done["count"]
        self.add("cycle" + where, f"{clients} at once: one cycle and freeing", name, each)
        for call in ("prepare", "mounts", "remove") if clients == 1 else ():
            self.add("cycle" + where, call, name, statistics.median(done[call]))

    def stack(self):
        target = self.world.scratch / "mounted"
        target.mkdir()
        for name in self.rounds("stack"):
            made = self.world.calls(name, "stack", "top", "--layers", self.given.layers)
            self.add("stack", f"making {self.given.layers}", name, made["seconds"])
            self.add("stack", "Commit", name, statistics.median(made["commit"]))
            mounted = self.world.calls(name, "mount", "top", target)
            run("umount", target)
            self.add("stack", "Mounts", name, mounted["mounts"])
            self.add("stack", "mounting", name, mounted["mount"])
            self.world.empty(name)

    def imports(self):
        image = Path(run(REPOSITORY / "scripts/make-image", self.given.dir)) / self.given.archive
        for name in self.rounds("import"):
            Path("/proc/sys/vm/drop_caches").write_text("3")
            command = self.world.ctr("images", "import", "--snapshotter", name, image)
            took = timed(command, self.world.scratch / "import.out", self.world.disks[SNAPSHOTTERS[name][0]])
            self.add("import", "ctr images import", name, took["wall"])
            count = len(run(*self.world.ctr("snapshots", "--snapshotter", name, "ls")).splitlines()) - 1
            assert count > 1, f"{name}: {count} layers"
            run(*self.world.ctr("images", "rm", "--sync", *run(*self.world.ctr("images", "ls", "-q")).split()))
            self.world.empty(name)

    def usage(self):
        trees = {name: self.tree(name) for name in self.given.snapshotters}
        for name in self.rounds("usage"):
            self.one_usage(name, trees[name])
        for name in self.given.snapshotters:
            if trees[name] == self.world.scratch / f"many-{name}":
                run("umount", trees[name])
            self.world.empty(name)

    def one_usage(self, name, tree):
        # The kernel knows of it for sure when it is written down: qgroups and btrfs's own metadata lag behind.
        (tree / "one-more").write_bytes(os.urandom(1 << 16))
        sync_filesystem(tree)
        self.world.settle()
        changed = self.world.calls(name, "usage", "many")
        assert changed["bytes"] > 1 << 16 and changed["inodes"] > self.given.files, changed
        self.add("usage", "after a write", name, changed["seconds"][0])
        again = self.world.calls(name, "usage", "many", "--count", 3)
        self.add("usage", "once more", name, statistics.median(again["seconds"]))
        print(f"usage: {name}: {again['bytes']} bytes, {again['inodes']} inodes", file=sys.stderr, flush=True)

    def tree(self, name):
        """An active snapshot with many files in it, mounted; where they can be written without a copy."""
        target = self.world.scratch / f"many-{name}"
        target.mkdir()
        print(f"usage: files for {name}", file=sys.stderr, flush=True)
        self.world.calls(name, "stack", "many", "--layers", 1)
        mounted = self.world.calls(name, "mount", "many", target)
        tree = Path(mounted["upper"] or target)
        if mounted["upper"]:
            run("umount", target)
        for number in range(self.given.files):
            if number % 200 == 0:
                directory = tree / f"{number // 200}"
                directory.mkdir()
            with open(directory / f"{number}", "wb", buffering=0) as file:
                file.write(b"a small file\n")
        return tree

    def list(self):
        for name in self.given.snapshotters:
            print(f"list: snapshots for {name}", file=sys.stderr, flush=True)
            self.world.calls(name, "fill", "listed", "--count", self.given.snapshots)
        for name in self.rounds("list"):
            listed = self.world.calls(name, "list")
            assert listed["count"] == self.given.snapshots, listed
            self.add("list", f"List of {listed['count']}", name, listed["seconds"][0])
            stats = self.world.calls(name, "stat", "listed-1", "--count", 200)["seconds"]
            self.add("list", "Stat", name, statistics.median(stats))
        for name in self.rounds("list alone", proxies(self.given.snapshotters)):
            listed = self.world.calls(name, "list", direct=True)
            self.add("list on our socket", f"List of {listed['count']}", name, listed["seconds"][0])


def table(case, columns):
    """Milliseconds, and for a proxy beneath them the multiple of the built-in one's in the same round."""
    names = list(dict.fromkeys(name for runs in columns.values() for name in runs))
    lines = [f"### {case}\n", f"| ms | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for column, runs in columns.items():
        lines.append(f"| {column} | {' | '.join(cell(name, runs) for name in names)} |")
    return "\n".join(lines) + "\n"


def cell(name, runs):
    if name not in runs:
        return ""
    milliseconds = [1000 * seconds for seconds in runs[name]]
    text = spread(milliseconds, 2 if max(milliseconds) < 100 else 0)
    built_in = runs.get(SNAPSHOTTERS[name][1])
    if not built_in:
        return text
    ratios = [our / theirs for our, theirs in zip(runs[name], built_in)]
    median, least, most = (f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.1g}"
                           for ratio in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"{text} **× {median}** ({least}–{most})"


def arguments():
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphdriver"
    release = REPOSITORY / "target/release"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphdriver", default=release / "graphdriver", type=Path, metavar="PATH")
    parser.add_argument("--calls", default=release / "examples/snapshotter-calls", type=Path, metavar="PATH")
    parser.add_argument("--cases", default=",".join(CASES), help="of %(default)s", metavar="A,B")
    parser.add_argument("--snapshotters", default=",".join(DEFAULT), metavar="A,B",
                        help="of %(default)s (the default), gd-devicemapper, gd-zfs")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--count", default=300, type=int, help="cycles in each round (%(default)s)")
    parser.add_argument("--layers", default=128, type=int, help="in a stack (%(default)s)")
    parser.add_argument("--files", default=200_000, type=int, help="in the measured layer (%(default)s)")
    parser.add_argument("--snapshots", default=10_000, type=int, help="to list (%(default)s)")
    parser.add_argument("--archive", default="oci.tar", help="of scripts/make-image (%(default)s)")
    parser.add_argument("--disk", default=16, type=int, metavar="GIB", help="each of two sparse disks (%(default)s)")
    parser.add_argument("--qgroups", action="store_true", help="with btrfs's quotas turned on")
    parser.add_argument("--pquota", action="store_true", help="with ext4's project quotas turned on")
    parser.add_argument("--quick", action="store_true", help="small figures and 2 rounds, to see that it runs")
    parser.add_argument("--dir", default=cache, type=Path, help="where disks are made (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write every sample there")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.count, given.layers, given.files, given.snapshots = 2, 48, 16, 5000, 500
    given.cases, given.snapshotters = given.cases.split(","), given.snapshotters.split(",")
    for value, known in [(c, CASES) for c in given.cases] + [(s, SNAPSHOTTERS) for s in given.snapshotters]:
        if value not in known:
            parser.error(f"{value}: not one of {', '.join(known)}")
    # What lists leaves its snapshots to the end of the disks.
    given.cases = [case for case in CASES if case in given.cases]
    return given


def main():
    given = arguments()
    if os.geteuid() != 0:
        raise SystemExit("snapshotter.py: needs root, as containerd does")
    for binary, made in [(given.graphdriver, "--features btrfs -p graphdriver -p graphdriver-vfs-fuse"),
                         (given.calls, "--example snapshotter-calls")]:
        if not binary.exists():
            raise SystemExit(f"snapshotter.py: {binary} is not there: cargo build --release {made}")
    if os.environ.get("GRAPHDRIVER_BENCH_NAMESPACE") != "1":
        os.environ["GRAPHDRIVER_BENCH_NAMESPACE"] = "1"
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp("unshare", ["unshare", *namespaces, sys.executable, *sys.argv])
    given.dir.mkdir(parents=True, exist_ok=True)
    begun = {"machine": machine(given.dir, ["containerd"]), "load": os.getloadavg()}
    scratch = Path(tempfile.mkdtemp(prefix="snap-", dir=given.dir.resolve()))
    try:
        world = World(scratch, given)
        cases = Cases(world, given)
        for case in given.cases:
            getattr(cases, {"import": "imports"}.get(case, case))()
        world.stop()
    finally:
        let_go(scratch)
        # The disks are let go with this mount namespace, whatever is still mounted from them.
        for kind in MKFS:
            subprocess.run(["umount", "--lazy", scratch / kind], capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(table(case, columns) for case, columns in cases.samples.items()))
    if given.json:
        report = {**begun, "load_at_the_end": os.getloadavg(), "qgroups": given.qgroups, "pquota": given.pquota}
        figures = ("rounds", "count", "layers", "files", "snapshots", "archive")
        report["arguments"] = {name: getattr(given, name) for name in figures}
        given.json.write_text(json.dumps({**report, "results": cases.samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
