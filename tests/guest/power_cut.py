"""The power cut: QEMU is killed in the middle of load, commit and remove, again and again on the same disks.

power-cut-guest (bash, in the guest) tells of each step before it begins and after its command has ended. What had ended is
acknowledged: the next boot must find it, whole by digest, and what was removed must be gone. The one step that was cut may
have happened or not. Nothing may leak either way: the storage holds exactly the layers that the store knows.

What a killed QEMU loses is what a guest's power cut loses: all that its kernel had not yet written, in particular
everything in its page cache that nobody flushed. What it had written is kept, by this machine's page cache, also where no
flush had followed. So a forgotten fsync(2) shows, and a disk that loses or tears its own cache is not simulated.
"""
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import shlex
import subprocess
import sys
import tarfile
import time

import machine

CUT_IN = ["load", "commit", "rm", "rmi", "create"]
# Cuts that count, as only these steps end with something to lose.
COUNTED = {"load", "commit", "rm", "rmi"}
BOOT_AND_VERIFY_SECONDS = 600


@dataclasses.dataclass
class Row:
    """A driver on a disk. The commands are bash, with $disk, $store (ROOT/DRIVER) and /data, where ROOT lies."""
    driver: str
    make: str
    open: str
    # Prints the numbers of the layers that the storage holds.
    objects: str = "ls $store/data | grep -xE '[0-9]+'"
    options: str = ""
    # The size of each container, where its limit is a project quota.
    limit: str = ""


# By the pool's own list, with the layers' numbers where pool.json says whose they are.
THIN_DEVICES = """
json=$store/data/pool.json; [ -e $json ] || exit 0
pool=graphdriver-$(jq -r .id $json)-pool
dmsetup info $pool >/dev/null 2>&1 || { jq -r '.layers | keys[]' $json; exit; }
dmsetup message $pool 0 reserve_metadata_snap || echo no-metadata-snapshot
thin_ls -m --no-headers -o DEV $(losetup -nO NAME -j $store/data/metadata) | while read -r thin; do
    jq -r --argjson thin $thin 'if .base.thin == $thin then empty
        else ([.layers | to_entries[] | select(.value.thin == $thin) | .key][0] // "thin-device-\\($thin)-of-no-layer") end' $json
done
dmsetup message $pool 0 release_metadata_snap
"""

ROWS = {
    "overlay2-ext4": Row("overlay2", "mkfs.ext4 -q -F -E lazy_itable_init=0,assume_storage_prezeroed=1 $disk", "mount $disk /data"),
    "overlay2-xfs": Row("overlay2", "mkfs.xfs -q -f $disk", "mount $disk /data"),
    "overlay2-prjquota": Row("overlay2", "mkfs.ext4 -q -F -E lazy_itable_init=0,assume_storage_prezeroed=1,quotatype=prjquota -O project,quota $disk",
                             "mount -o prjquota $disk /data", limit="64M"),
    "overlay2-pquota": Row("overlay2", "mkfs.xfs -q -f $disk", "mount -o pquota $disk /data", limit="64M"),
    "vfs-fuse": Row("vfs-fuse", "mkfs.ext4 -q -F -E lazy_itable_init=0,assume_storage_prezeroed=1 $disk", "mount $disk /data"),
    "btrfs": Row("btrfs", "mkfs.btrfs -q -f $disk", "mount $disk /data", objects="ls $store/data/layers 2>/dev/null"),
    "zfs": Row("zfs", "zpool create -f -O mountpoint=none tank $disk && zfs create -o mountpoint=/data tank/data && zpool export tank",
               "blockdev --rereadpt $disk; udevadm settle; zpool import -f -d /dev tank",
               objects="zfs list -Hro name -t filesystem tank/data | sed -n 's|^tank/data/graphdriver-[^/]*/||p' | grep -vx empty"),
    "devicemapper": Row("devicemapper", "mkfs.ext4 -q -F -E lazy_itable_init=0,assume_storage_prezeroed=1 $disk", "mount $disk /data",
                        objects=THIN_DEVICES, options="dm.basesize=400M,dm.loopdatasize=4G,dm.loopmetadatasize=64M"),
}


class Wrong(Exception):
    """The guest found something lost, broken or leaked."""


def layer(files):
    """A layer tar of these files; a content of None is a directory, a whiteout is a file of that name."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mtime, entry.mode = 1_700_000_000, 0o755 if content is None else 0o644
            entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            entry.size = len(content or b"")
            tar.addfile(entry, io.BytesIO(content or b""))
    return data.getvalue()


def random_files(seed, directory):
    draw = random.Random(seed)
    return {directory: None, **{f"{directory}/f{n}": draw.randbytes(draw.randrange(60_000)) for n in range(40)}}


def archive(path, nth):
    """Writes image `nth` as `docker save` would, and returns the sums of its files. The lowest layer is in all images."""
    lowest = random_files("lowest", "d0") | random_files("lowest, removed", "removed")
    middle = random_files(f"{nth}", "d1") | {"removed/.wh.f3": b""}
    top = random_files(f"{nth} top", "d2") | {"d0/f1": f"changed by image {nth}".encode(), ".wh.removed": b""}
    layers = [layer(files) for files in (lowest, middle, top)]
    digests = [hashlib.sha256(data).hexdigest() for data in layers]
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        "history": [{"created_by": "power cut"} for _ in layers],
    }).encode()
    name = hashlib.sha256(config).hexdigest() + ".json"
    members = {f"{digest}/layer.tar": data for digest, data in zip(digests, layers)}
    manifest = [{"Config": name, "RepoTags": [f"localhost/image{nth}:1"], "Layers": list(members)}]
    members |= {name: config, "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(layer(members))
    tree = {name: data for files in (lowest, middle, top) for name, data in files.items()
            if data is not None and not name.startswith("removed/") and ".wh." not in name}
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in tree.items())


class Round:
    """What is known from the guest's lines, and when to cut."""

    def __init__(self, expected, target, durations):
        self.expected, self.target, self.durations = expected, target, durations
        self.have, self.verified = {}, None
        self.step = self.began = self.cut_at = None
        self.steps = 0
        self.skip = random.randrange(3)
        self.rest, self.said = b"", []

    def write(self, data):
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.line(line.decode(errors="replace"))

    def line(self, line):
        match line.split():
            case ["@have", kind, name, identity]:
                self.have[kind, name] = ("must", identity)
            case ["@verified", *what]:
                self.verified = " ".join(what)
            case ["@working"]:
                # What was uncertain has been found, or found missing.
                self.expected = dict(self.have)
            case ["@begin", step, name]:
                self.begin(step, name)
            case ["@done", step, name, *identity]:
                self.durations[step] = time.monotonic() - self.began
                self.expected[self.key(step, name)] = ("gone", "-") if step in ("rm", "rmi") else ("must", *(identity or "-"))
                self.step = None
            case _:
                self.said.append(line)

    def begin(self, step, name):
        self.step, self.began = (step, name), time.monotonic()
        self.steps += 1
        key = self.key(step, name)
        self.expected[key] = ("maybe", self.expected.get(key, ("", "-"))[1] if step in ("rm", "rmi") else "-")
        # Where the target does not come, because all its images are in use, another step will do.
        if step == self.target or self.steps > 40:
            self.skip -= 1
            if self.skip < 0 and not self.cut_at:
                self.cut_at = self.began + random.uniform(0, self.durations.get(step, 1))

    @staticmethod
    def key(step, name):
        return ("container" if step in ("create", "rm") else "image", name)


def job(path, row, programs, directory, expected, **variables):
    lines = "".join(f"{state} {kind} {name} {identity}\n" for (kind, name), (state, identity) in expected.items())
    (directory / "expected").write_text(lines)
    variables |= {"DRIVER": row.driver, "OPTIONS": row.options, "MAKE": row.make, "OPEN": row.open, "OBJECTS": row.objects, "LIMIT": row.limit,
                  "PROGRAMS": str(programs[0].parent)}
    exports = "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in variables.items())
    sent = [(program, program) for program in programs] + [(directory / "expected", "/job/expected")]
    sent += [(file, f"/job/{file.name}") for file in directory.glob("localhost_*")]
    sent.append((machine.HERE / "power-cut-guest", "/job/power-cut-guest"))
    machine.write_job(path, f"#!/bin/bash\n{exports}exec bash ./power-cut-guest\n", sent, tidy=False)


def one_boot(guest, state, last):
    """Until the power is cut, or with `last` until the guest has ended. True if it was cut."""
    guest.go()
    deadline = time.monotonic() + BOOT_AND_VERIFY_SECONDS
    while True:
        code = guest.relay(state.write, 0.01)
        if code is not None:
            if code or not last:
                raise Wrong("\n".join(state.said[-40:]) or f"the guest ended with {code}")
            return False
        now = time.monotonic()
        if state.cut_at and now >= state.cut_at:
            guest.kill()
            # What it had said before its end counts.
            while data := os.read(guest.output, 1 << 16):
                state.write(data)
            return True
        if now > deadline:
            raise Wrong("the guest took too long; it said last:\n" + "\n".join(state.said[-40:]))


def cut(name, rounds, programs):
    """All rounds of one row. Each boot looks at what the one before left, so there is one more without a cut. Cuts that
    came too late for their step are not counted, but looked at like all."""
    row, expected, durations, cuts = ROWS[name], {}, {}, {}
    image, saved = machine.prepare()
    with machine.run_directory() as directory:
        machine.make_scratch(directory / "scratch")
        for nth in range(3):
            (directory / f"localhost_image{nth}_1.sums").write_text(archive(directory / f"localhost_image{nth}_1.tar", nth))
        for number in itertools.count():
            counted = sum(count for step, count in cuts.items() if step in COUNTED)
            last = counted >= rounds
            if number > 3 * rounds + 5:
                raise Wrong(f"{name}: only {counted} of {number} power cuts were in the middle of {', '.join(sorted(COUNTED))}")
            state = Round(expected, CUT_IN[number % len(CUT_IN)], durations)
            # Removing everything shows leaks best, but only what stays grows old.
            wipe = last or number % 4 == 3
            job(directory / "job", row, programs, directory, expected,
                ROUND=number, FRESH=int(number == 0), WIPE=int(wipe), LAST=int(last))
            try:
                with machine.Machine(image, directory, saved) as guest:
                    one_boot(guest, state, last)
            except Wrong as wrong:
                raise Wrong(f"{name}, boot {number}, after {describe(state)}:\n{wrong}") from None
            print(f"{name}: boot {number}: verified {state.verified}{', removed all' if wipe else ''}; "
                  + ("done" if last else f"power cut {describe(state)}"), flush=True)
            if last:
                break
            where = state.step[0] if state.step else "between"
            cuts[where] = cuts.get(where, 0) + 1
            expected = state.expected
    print(f"{name}: {sum(cuts.values())} power cuts survived: " + ", ".join(f"{count} in {step}" for step, count in cuts.items()), flush=True)


def describe(state):
    if state.step:
        return f"{time.monotonic() - state.began:.2f} s into {' '.join(state.step)}, step {state.steps}"
    return f"between steps, after {state.steps}"


def build():
    """The programs as they are built for tests."""
    packages = ["-p", "graphdriver", "-p", "graphdriver-vfs-fuse", "--features", "graphdriver/full"]
    command = ["cargo", "build", "--locked", "--bins", *packages, "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=machine.HERE.parent.parent, stdout=subprocess.PIPE)
    if built.returncode:
        sys.exit(built.returncode)
    messages = map(json.loads, built.stdout.splitlines())
    return [pathlib.Path(message["executable"]) for message in messages if message.get("executable")]


def main(names, rounds):
    for name in names:
        if name not in ROWS:
            raise machine.GuestError(f"no power-cut test of {name!r}; there are {', '.join(ROWS)}")
    programs = build()
    failed = []
    for name in names or ROWS:
        try:
            cut(name, rounds, programs)
        except (Wrong, machine.GuestError) as error:
            print(f"guest-test: power cut: {error}", file=sys.stderr, flush=True)
            failed.append(f"scripts/guest-test --power-cut {name} --rounds {rounds}")
    return failed
