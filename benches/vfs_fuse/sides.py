"""The filesystems that are compared, and what can be read of their daemons."""

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
LIMIT = 600  # seconds that any command may take: a filesystem that hangs fails its row
TICK = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A side could not do a row's work; the other sides go on."""


def run(*command, **options):
    """Runs a command and returns its output; what it complained of is shown only if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="surrogateescape", timeout=LIMIT, **options)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Failed(f"`{' '.join(words)[:120]}` ended with {done.returncode}: {' / '.join(lines[-3:])[:400]}")
    return done.stdout.strip()


def sync_filesystem(directory):
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if LIBC.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs", str(directory))
    finally:
        os.close(descriptor)


def drop_caches():
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def remove(directory):
    """rm is quicker than shutil, and goes through directories of mode 000 that overlayfs leaves in its workdir."""
    run("rm", "-rf", "--one-file-system", directory)


class Mounted:
    """A fixture as one side shows it: `path` is where the work is done, `upper` keeps what the work changed."""

    def __init__(self, side, fixture, scratch):
        self.side, self.fixture = side, fixture
        self.home = scratch / f"{side.name}-{fixture.name}"
        self.upper, self.work, self.path = (self.home / name for name in ("upper", "work", "merged"))
        self.process, self.attached = None, False
        self.fresh()

    def fresh(self):
        """Mounts anew with nothing in the upper layer."""
        self.close()
        for directory in (self.upper, self.work, self.path):
            directory.mkdir(parents=True)
        self.side.attach(self)

    def remount(self):
        """Mounts anew with the same upper layer: no dentry, inode or page of it stays."""
        self.side.detach(self)
        self.side.attach(self)

    def revive(self):
        if self.process:
            self.process.kill()
        self.fresh()

    def close(self):
        self.side.detach(self)
        if self.home.exists():
            remove(self.home)

    def cpu(self):
        """The daemon's CPU seconds so far, None where there is no daemon; ticks of 10 ms."""
        if not self.process:
            return None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / TICK  # utime and stime: proc_pid_stat(5)

    def memory(self):
        """Pss and private anonymous memory of the daemon in bytes."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
        return {"pss": sizes["Pss:"], "anonymous": sizes["Anonymous:"]}


class Native:
    """A plain directory: a copy of the merged tree where the work changes it, else the tree itself."""

    name, daemon = "native", False

    def version(self):
        return ""

    def attach(self, mounted):
        if mounted.fixture.changed:
            if not any(mounted.path.iterdir()):
                run("cp", "-a", f"{mounted.fixture.plain}/.", mounted.path)
        else:
            run("mount", "--bind", mounted.fixture.plain, mounted.path)
            mounted.attached = True

    def detach(self, mounted):
        if mounted.attached:
            run("umount", mounted.path)
            mounted.attached = False


class Overlay:
    """The kernel's own overlayfs with its default settings."""

    name, daemon = "overlay", False

    def __init__(self, rootless):
        self.extra = ",userxattr" if rootless else ""

    def version(self):
        return f"Linux {os.uname().release}{self.extra}"

    def attach(self, mounted):
        run("mount", "-t", "overlay", "overlay", "-o", layers(mounted) + self.extra, mounted.path)
        mounted.attached = True

    def detach(self, mounted):
        if mounted.attached:
            run("umount", mounted.path)
            mounted.attached = False
            # The work directory of an overlay cannot be taken over by another mount once its upper was replaced.
            shutil.rmtree(mounted.work / "work", ignore_errors=True)


class Fuse:
    """A program with fuse-overlayfs's command line, kept in the foreground so that its process is known."""

    daemon = True

    def __init__(self, name, program):
        self.name, self.program = name, program

    def version(self):
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        return next((line for line in lines if "overlayfs" in line or self.name in line), lines[0] if lines else "?")

    def attach(self, mounted):
        log = open(mounted.home / "log", "wb")
        with log:
            command = [self.program, "-f", "-o", layers(mounted), str(mounted.path)]
            mounted.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not mounted.path.is_mount():
            if mounted.process.poll() is not None or time.monotonic() > deadline:
                message = (mounted.home / "log").read_text(errors="replace").strip()
                self.detach(mounted)
                raise Failed(f"{self.program} did not mount: {message[-400:] or 'no message'}")
            time.sleep(0.005)

    def detach(self, mounted):
        if not mounted.process:
            return
        # A daemon that died leaves a mount that stat(2) refuses: `umount` takes it away all the same.
        subprocess.run(["umount", mounted.path], capture_output=True)
        try:
            mounted.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            mounted.process.kill()
            mounted.process.wait()
            subprocess.run(["umount", "-l", mounted.path], capture_output=True)
        mounted.process = None


def layers(mounted):
    lowers = ":".join(str(lower) for lower in mounted.fixture.lowers)
    return f"lowerdir={lowers},upperdir={mounted.upper},workdir={mounted.work}"
