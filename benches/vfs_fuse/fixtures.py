"""What the sides are shown: layers on the benchmark's own filesystem, made once for each run when a row asks."""

import json
import os
import random
import subprocess
import tarfile
from pathlib import Path

from .sides import run

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILES = 5_000
CHMOD_FILES = 4_400
MANY = 200_000
SMALL = 2_000
IO_BYTES = 64 << 20
GIT = ("git", "-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "core.fsmonitor=false",
       "-c", "user.name=bench", "-c", "user.email=bench@localhost")


class Fixture:
    """Lower layers, the topmost first, and the same tree as a plain directory."""

    def __init__(self, name, lowers, plain, changed):
        self.name, self.lowers, self.plain, self.changed = name, lowers, plain, changed


class Fixtures:
    def __init__(self, scratch, rootless, cache):
        self.scratch, self.rootless, self.cache = scratch, rootless, cache

    def make(self, name):
        build = getattr(self, name)
        home = self.scratch / "fixtures" / name
        home.mkdir(parents=True)
        fixture = build(home)
        os.sync()
        return fixture

    def one_layer(self, home, fill, changed):
        tree = home / "tree"
        tree.mkdir()
        fill(tree)
        return Fixture(home.name, [tree], tree, changed)

    def image(self, home):
        """The Debian image of scripts/make-image, unpacked layer by layer as overlay2 does it."""
        source = Path(run(REPOSITORY / "scripts/make-image", self.cache)) / "docker.tar"
        with tarfile.open(source) as archive:
            names = json.load(archive.extractfile("manifest.json"))[0]["Layers"]
        layers = []
        for number, name in enumerate(names):
            layer = home / str(number)
            layer.mkdir()
            self.unpack(source, name, layer)
            layers.insert(0, layer)
        # One copy for both: native sees what the union shows, on the same filesystem.
        plain, view = home / "plain", home / "view"
        plain.mkdir()
        view.mkdir()
        options = f"ro,lowerdir={':'.join(map(str, layers))}" + (",userxattr" if self.rootless else "")
        run("mount", "-t", "overlay", "overlay", "-o", options, view)
        run("cp", "-a", f"{view}/.", plain)
        run("umount", view)
        return Fixture("image", layers, plain, False)

    def unpack(self, source, name, layer):
        # The image's odd names are for the tests: fuse-overlayfs 2.0 answers EIO to a directory with a name not UTF-8.
        # Without privilege there are no devices to be had.
        words = ["--anchored", "--exclude=var/lib/graphdriver"]
        words += ["--exclude=dev/*", "--no-same-owner"] if self.rootless else ["--same-owner", "--numeric-owner"]
        with subprocess.Popen(["tar", "-xOf", source, name], stdout=subprocess.PIPE) as feed:
            run("tar", "-xpf", "-", "-C", layer, *words, stdin=feed.stdout)
        if feed.returncode != 0:
            raise SystemExit(f"vfs_fuse.py: unpacking {name} of {source} failed with {feed.returncode}")
        for mark in list(layer.rglob(".wh.*")):
            mark.unlink()
            if mark.name == ".wh..wh..opq":
                os.setxattr(mark.parent, f"{'user' if self.rootless else 'trusted'}.overlay.opaque", b"y")
            else:
                os.mknod(mark.with_name(mark.name[4:]), 0o020000, 0)

    def files(self, home):
        """FILES files of 1 byte to 39 KiB in directories of 100."""
        return self.one_layer(home, lambda tree: fill(tree, FILES), True)

    def chmod(self, home):
        return self.one_layer(home, lambda tree: fill(tree, CHMOD_FILES), True)

    def empty(self, home):
        return self.one_layer(home, lambda tree: (tree / "dir").mkdir(), True)

    def many(self, home):
        def make(tree):
            for number in range(MANY):
                directory = tree / f"d{number // 100}"
                if number % 100 == 0:
                    directory.mkdir()
                os.mknod(directory / f"file{number}")

        return self.one_layer(home, make, False)

    def data(self, home):
        def make(tree):
            (tree / "small").mkdir()
            for number in range(SMALL):
                (tree / "small" / str(number)).write_bytes(b"s" * 512)
            for job in range(4):
                (tree / f"lower{job}").write_bytes(random.Random(job).randbytes(IO_BYTES))

        return self.one_layer(home, make, True)

    def big(self, home):
        def make(tree):
            block = random.Random(1).randbytes(1 << 20)
            with open(tree / "big", "wb") as file:
                for _ in range(1024):
                    file.write(block)

        return self.one_layer(home, make, True)

    def git(self, home):
        """A repository of 4,000 files whose last commit changed 1,000 of them, added 300 and took 300 away."""

        def make(tree):
            run(*GIT, "init", "-q", tree)
            for number in range(4_000):
                path = tree / f"d{number // 50}" / f"f{number}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{number}\n" * (number % 400 + 1))
            commit(tree, "first")
            for number in range(0, 4_000, 4):
                (tree / f"d{number // 50}" / f"f{number}.txt").write_text(f"changed {number}\n" * (number % 400 + 1))
            for number in range(1, 1_201, 4):
                (tree / f"d{number // 50}" / f"f{number}.txt").unlink()
                (tree / f"d{number // 50}" / f"new{number}.txt").write_text("new\n" * 100)
            commit(tree, "second")

        return self.one_layer(home, make, True)

    def program(self, home):
        """A C program of 24 files and a makefile."""

        def make(tree):
            units = [f"unit{number}" for number in range(24)]
            (tree / "all.h").write_text("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n" + "".join(
                f"int {unit}_{n}(int, const char *);\n" for unit in units for n in range(40)))
            for unit in units:
                (tree / f"{unit}.c").write_text('#include "all.h"\n' + "".join(
                    f"int {unit}_{n}(int a, const char *s) {{ char b[64]; int i, t = a; for (i = 0; i < a; i++) "
                    f't += snprintf(b, sizeof b, "%s%d", s, i * {n}) + (int)strlen(b); return t % {n + 7}; }}\n'
                    for n in range(40)))
            (tree / "main.c").write_text('#include "all.h"\nint main(void) { return '
                                         + " + ".join(f'{unit}_1(2, "x")' for unit in units) + " > 1000; }\n")
            objects = " ".join(f"{unit}.o" for unit in [*units, "main"])
            (tree / "Makefile").write_text(f"main: {objects}\n\tcc -o main {objects}\n"
                                           "%.o: %.c all.h\n\tcc -O1 -c -o $@ $<\n")

        return self.one_layer(home, make, True)


def commit(tree, message):
    run(*GIT, "-C", tree, "add", "-A")
    run(*GIT, "-C", tree, "commit", "-q", "-m", message)


def fill(tree, count):
    sizes, content = random.Random(count), random.Random(0).randbytes(40_000)
    for number in range(count):
        path = tree / f"d{number // 100}" / f"f{number}"
        if number % 100 == 0:
            path.parent.mkdir()
        path.write_bytes(content[: sizes.randrange(1, 40_000)])
