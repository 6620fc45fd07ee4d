"""The rows: on which fixture, in which state of the caches, doing what."""

import subprocess
import time
from dataclasses import dataclass
from typing import Callable

from .fixtures import FILES, GIT, IO_BYTES, MANY, SMALL
from .sides import LIMIT, Failed, run

COLD, WARM, FRESH = "cold", "warm", "fresh"
OVERLAY = "overlay +10%"
UNBOUND = 1000
NAMES = 5_000


@dataclass
class Row:
    """`work` returns seconds, of the whole or of one operation; `state` says what is done before it.

    cold: mounted anew with the upper layer it has, all caches dropped, the tools read again.
    warm: the same work done once before.
    fresh: mounted anew with an empty upper layer, `prepare` run, the tree walked once.
    `wanted` is the issue's bound as a multiple of native, or in words; `metadata` rows are to be at least twice as fast
    as the fastest fuse-overlayfs; `rounds` bounds the rounds of a row that takes long.
    """

    name: str
    what: str
    fixture: str
    state: str
    work: Callable
    prepare: Callable = lambda job: None
    tools: tuple = ()
    device: bool = False
    memory: bool = False
    rootless: bool = True
    metadata: bool = False
    rounds: int = UNBOUND
    wanted: str = ""


@dataclass
class Job:
    """What a row's functions are given."""

    mounted: object
    helper: str
    seconds: float
    tar: str

    @property
    def path(self):
        return self.mounted.path

    def command(self, *words):
        """Wall seconds of a command whose output goes nowhere."""
        start = time.perf_counter()
        done = subprocess.run([str(word) for word in words], cwd=self.path, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=LIMIT)
        took = time.perf_counter() - start
        if done.returncode != 0:
            message = done.stderr.decode(errors="replace").strip().splitlines()
            called = " ".join(map(str, words))[:120]
            raise Failed(f"`{called}` ended with {done.returncode}: {' / '.join(message[-2:])[:400]}")
        return took

    def count(self, *words):
        """What the helper measured."""
        return float(run(self.helper, *words, cwd=self.path))


def walk(job):
    return job.command("find", ".", "-printf", "%s %m %U %T@\\n")


def tar_tree(job):
    # tar reads no file's content when it sees that its output is /dev/null.
    return job.command("bash", "-o", "pipefail", "-c", "tar -cf - . | cat >/dev/null")


def untar(job):
    return job.command("tar", "-xf", job.tar, "-C", "dir")


def transfer(kind, order, layer, jobs):
    block = 1 << 20 if order == "seq" else 4096

    def work(job):
        files = [f"{layer}{number}" for number in range(jobs)]
        return job.count("io", kind, order, job.seconds, block, *files)

    return work


def upper_files(job):
    """Files of the upper layer, read once, so that whoever keeps pages has them."""
    for number in range(4):
        if not (job.path / f"upper{number}").exists():
            (job.path / f"upper{number}").write_bytes(bytes([number + 1]) * IO_BYTES)


def names(mode):
    return lambda job: job.count(mode, "dir", NAMES)


def read_big(job):
    """Has the copy-up read from the page cache, in every round and for everyone."""
    run("sh", "-c", 'cat "$0"/big | wc -c', job.mounted.fixture.lowers[0])


def data_rows():
    rows = []
    for kind, layer in (("read", "lower"), ("read", "upper"), ("write", "upper")):
        for order, unit in (("seq", "1 MiB in sequence"), ("rand", "4 KiB at random")):
            for jobs in (1, 4):
                note = ", over what is there, no fsync" if kind == "write" else ""
                each = f"{jobs} processes, a file each" if jobs > 1 else "1 process"
                what = f"{kind} of {unit}, {layer} file of 64 MiB, {each}{note}"
                work, prepare = transfer(kind, order, layer, jobs), upper_files if layer == "upper" else Row.prepare
                name = f"{order}-{kind}-{layer}-{jobs}"
                rows.append(Row(name, what, "data", WARM, work, prepare, wanted=OVERLAY))
    return rows


def sh(*words):
    return lambda job: job.command(*words)


status = sh(*GIT, "status")
checkout = sh(*GIT, "checkout", "-q", "HEAD~1")
META = {"metadata": True}

ROWS = [
    Row("find-cold", "find with lstat of all, Debian image in layers", "image", COLD, walk,
        tools=("find",), wanted="1.7", **META),
    Row("find-warm", "the same again", "image", WARM, walk, wanted="1.3", **META),
    Row("ls-lR-warm", "ls -lR of the image", "image", WARM, sh("ls", "-lR"), wanted="2", **META),
    Row("tar-cold", "tar of the image into a pipe, all content read", "image", COLD, tar_tree,
        tools=("bash", "tar", "cat"), wanted="1.3"),
    Row("tar-warm", "the same again", "image", WARM, tar_tree, wanted="1.4"),
    Row("untar", f"tar -x of {FILES:,} files of 1 byte to 39 KiB into an empty directory", "empty", FRESH, untar,
        wanted="4"),
    Row("rm-upper", f"rm -rf of these {FILES:,} in the upper layer", "empty", FRESH, sh("rm", "-rf", "dir"), untar,
        wanted="3.5", **META),
    Row("create", f"create of {NAMES:,} empty files, each", "empty", FRESH, names("create"), **META),
    Row("stat", "lstat of them, each", "empty", FRESH, names("stat"), names("create"), **META),
    Row("stat-missing", f"lstat of {NAMES:,} names that do not exist, each, second time", "empty", FRESH,
        names("missing"), names("missing"), **META),
    Row("unlink", "unlink of the files created, each", "empty", FRESH, names("unlink"), names("create"), **META),
    Row("rm-lower", f"rm -rf of {FILES:,} lower files", "files", FRESH, sh("bash", "-c", "rm -rf d*"),
        wanted="2", **META),
    Row("chown-lower", f"chown -R of {FILES:,} lower files (98 MB)", "files", FRESH, sh("chown", "-R", "1:1", "."),
        device=True, rootless=False, **META),
    Row("chmod-lower", "chmod -R of 4,400 lower files (86 MB)", "chmod", FRESH, sh("chmod", "-R", "o-r", "."),
        device=True, wanted="12", **META),
    *data_rows(),
    Row("seq-read-cold", "one reading of a 64 MiB lower file, 1 MiB each", "data", COLD,
        lambda job: job.count("io", "read", "seq", 0, 1 << 20, "lower0")),
    Row("small-warm", f"open, read, close of {SMALL:,} lower files of 512 bytes, each", "data", WARM,
        lambda job: job.count("small", job.seconds, "small", SMALL)),
    Row("small-cold", "the same from a cold cache", "data", COLD, lambda job: job.count("small", 0, "small", SMALL)),
    Row("git-status-cold", "git status in a repository of 4,000 lower files, index refreshed before", "git", COLD,
        status, tools=("git",), wanted="1.3", **META),
    Row("git-status-warm", "the same again", "git", WARM, status, wanted="1.5", **META),
    Row("git-checkout", "git checkout of the commit before, 1,000 files changed, 300 added, 300 removed", "git", FRESH,
        checkout, status, wanted="2.5", **META),
    Row("make", "make -j2 of a C program of 25 files", "program", FRESH, sh("make", "-s", "-j2"), wanted="1.1"),
    Row("first-write", "open, write of 4 KiB into the middle of a 1 GiB lower file, close", "big", FRESH,
        lambda job: job.count("first", "big"), read_big, device=True, rounds=3, wanted="5 ms, 64 KiB"),
    Row("walk-200k", f"find with lstat of {MANY:,} empty lower files, mounted just before", "many", COLD, walk,
        tools=("find",), memory=True, rounds=2, **META),
]
