#!/usr/bin/env python3
"""Times graphdriver beside containerd, podman and umoci: see benches/README.md for what is measured and how.

Every run is one command, and after it a syncfs of the filesystem, both inside the timed region: whoever has already
made its work durable pays nothing for the second. Each round runs every tool once, in turning order, so that slow
drift of the machine hits all alike; ratios are taken within a round.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LIBC = ctypes.CDLL(None, use_errno=True)
FILES = 30_000
NAME = "localhost/bench:1"
TAR = "application/vnd.oci.image.layer.v1.tar"


def run(*command, **options):
    """Runs an untimed command; its output is shown only if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(f"peers.py: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def sync_filesystem(directory):
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if LIBC.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs", str(directory))
    finally:
        os.close(descriptor)


def timed(command, output, root, daemon=None):
    """Wall and CPU seconds and the peak RSS in bytes of the largest process, the daemon's share included."""
    daemon_cpu = cpu_of(daemon) if daemon else 0.0
    if daemon:
        Path(f"/proc/{daemon}/clear_refs").write_text("5")  # restarts VmHWM, proc_pid_clear_refs(5)
    with open(output, "wb") as sink, open(f"{output}.err", "wb") as errors:
        start = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=sink, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        sync_filesystem(root)
        wall = time.monotonic() - start
    if process.returncode != 0:
        message = Path(f"{output}.err").read_text(errors="replace")
        raise SystemExit(f"peers.py: {' '.join(map(str, command))} failed ({process.returncode}):\n{message}")
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * 1024
    if daemon:
        cpu += cpu_of(daemon) - daemon_cpu
        peak = max(peak, peak_of(daemon))
    return {"wall": wall, "cpu": cpu, "peak": peak}


def cpu_of(pid):
    # After the parenthesised name come state=0, …, utime=11, stime=12, cutime=13, cstime=14: proc_pid_stat(5).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def peak_of(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Tool:
    """One engine on a root of its own. Commands it does not have are None."""

    daemon = None

    def __init__(self, root):
        self.root = root
        root.mkdir(parents=True)
        self.mounted = root / "mounted"
        self.mounted.mkdir()
        self.start()

    def start(self):
        """Brings an empty store into being, so that no timed command pays for that."""

    def stop(self):
        shutil.rmtree(self.root)

    def load(self, image, archive):
        return None

    def diff(self):
        return None

    def commit(self):
        return None

    def export(self, out):
        return None

    def save(self, out):
        return None


class Graphdriver(Tool):
    name = "graphdriver"
    binary = None

    def command(self, *words):
        return [self.binary, "--root", self.root / "data", "--storage-driver", "overlay2", *words]

    def start(self):
        run(*self.command("images"))

    def load(self, image, archive):
        return self.command("load", "-i", image / archive)

    def check(self):
        assert len(json.loads(run(*self.command("--format", "json", "images")))) == 1

    def fill(self, base, tree):
        run(*self.command("load", "-i", base / "oci-plain.tar"))
        run(*self.command("create", "--name", "box", NAME))
        run(*self.command("mount", "box", self.mounted))
        run("cp", "-a", f"{tree}/.", self.mounted)
        run(*self.command("umount", self.mounted))

    def diff(self):
        return self.command("diff", "box")

    def commit(self):
        return self.command("commit", "box", "localhost/committed:1")

    def uncommit(self):
        run(*self.command("rmi", "localhost/committed:1"))

    def export(self, out):
        return self.command("export", "box", "-o", out)

    def save(self, out):
        return self.command("save", "-o", out, NAME)


class Containerd(Tool):
    name = "containerd"

    def command(self, *words):
        return ["ctr", "--address", self.root / "socket", *words]

    def start(self):
        config = self.root / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{self.root}/data"\nstate = "{self.root}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{self.root}/socket"\n'
        )
        with open(self.root / "log", "wb") as log:
            self.process = subprocess.Popen(["containerd", "--config", config], stdout=log, stderr=log)
        self.daemon = self.process.pid
        deadline = time.monotonic() + 30
        while subprocess.run(self.command("version"), capture_output=True).returncode != 0:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"peers.py: containerd did not start:\n{(self.root / 'log').read_text()}")
            time.sleep(0.1)

    def stop(self):
        self.process.terminate()
        self.process.wait()
        super().stop()

    def load(self, image, archive):
        return self.command("images", "import", "--snapshotter", "overlayfs", image / archive)

    def snapshots(self, *words):
        return self.command("snapshots", "--snapshotter", "overlayfs", *words)

    def check(self):
        assert len(run(*self.snapshots("ls")).splitlines()) > 1, "containerd unpacked nothing"

    def fill(self, base, tree):
        run(*self.load(base, "oci-plain.tar"))
        parent = run(*self.snapshots("ls")).splitlines()[-1].split()[0]
        run(*self.snapshots("prepare", "box", parent))
        run("sh", "-c", run(*self.snapshots("mounts", self.mounted, "box")))
        run("cp", "-a", f"{tree}/.", self.mounted)
        run("umount", self.mounted)

    def commit(self):
        return self.snapshots("diff", "--media-type", TAR, "box")

    def uncommit(self):
        """`snapshots diff` writes to stdout and leaves nothing behind."""

    def save(self, out):
        return self.command("images", "export", out, NAME)


class Podman(Tool):
    name = "podman"

    def command(self, *words):
        root = ["--root", self.root / "data", "--runroot", self.root / "run", "--tmpdir", self.root / "tmp"]
        return ["podman", *root, "--storage-driver", "overlay", *words]

    def start(self):
        run(*self.command("images"))

    def stop(self):
        # podman keeps the driver's home bind-mounted on itself.
        subprocess.run(["umount", "-l", self.root / "data" / "overlay"], capture_output=True)
        super().stop()

    def load(self, image, archive):
        return self.command("load", "--quiet", "--input", image / archive)

    def check(self):
        assert len(run(*self.command("images", "--quiet")).splitlines()) == 1

    def fill(self, base, tree):
        run(*self.load(base, "oci-plain.tar"))
        run(*self.command("create", "--name", "box", "--network", "none", NAME, "/none"))
        path = run(*self.command("mount", "box"))
        run("cp", "-a", f"{tree}/.", path)
        run(*self.command("umount", "box"))

    def diff(self):
        return self.command("diff", "box")

    def commit(self):
        return self.command("commit", "--quiet", "box", "localhost/committed:1")

    def uncommit(self):
        run(*self.command("rmi", "localhost/committed:1"))

    def export(self, out):
        return self.command("export", "--output", out, "box")

    def save(self, out):
        return self.command("save", "--quiet", "--output", out, NAME)


class Umoci(Tool):
    name = "umoci"

    def load(self, image, archive):
        # umoci reads layouts only; the layout beside oci.tar holds the same blobs.
        layout = {"oci.tar": "oci", "oci-plain.tar": "oci-plain"}.get(archive)
        if layout is None or not (image / layout).exists():
            return None
        tag = json.loads((image / layout / "index.json").read_text())["manifests"][0]["annotations"]
        name = tag["org.opencontainers.image.ref.name"]
        return ["umoci", "unpack", "--image", f"{image / layout}:{name}", self.root / "bundle"]

    def check(self):
        assert any((self.root / "bundle" / "rootfs").iterdir())

    def fill(self, base, tree):
        run("cp", "-a", base / "oci-plain", self.root / "layout")
        run("umoci", "unpack", "--image", f"{self.root}/layout:{NAME}", self.root / "bundle")
        run("cp", "-a", f"{tree}/.", self.root / "bundle" / "rootfs")

    def commit(self):
        return ["umoci", "repack", "--image", f"{self.root}/layout:committed", self.root / "bundle"]

    def uncommit(self):
        run("umoci", "rm", "--image", f"{self.root}/layout:committed")
        run("umoci", "gc", "--layout", self.root / "layout")


def write_image(layer, out):
    """An OCI layout, and the archive of it, with the one uncompressed layer `layer` (a tar, which moves into it)."""
    blobs = out / "oci-plain" / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def add(content, media_type):
        digest = sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    with open(layer, "rb") as file:
        digest, size = "sha256:" + digest_of(file), os.fstat(file.fileno()).st_size
    layer.rename(blobs / digest[7:])
    config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/none"]}}
    config["rootfs"] = {"type": "layers", "diff_ids": [digest]}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
    manifest["config"] = add(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    manifest["layers"] = [{"mediaType": TAR, "digest": digest, "size": size}]
    entry = add(json.dumps(manifest).encode(), manifest["mediaType"])
    entry["annotations"] = {"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": NAME}
    layout = out / "oci-plain"
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    run("tar", "--create", "--file", out / "oci-plain.tar", "--directory", layout, ".")


def digest_of(file):
    digest = sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def make_tree(tree):
    """30,000 files in 1,000 directories, most of them small, as packages are: the same bytes on every machine."""
    chance = random.Random(1)
    for number in range(FILES):
        directory = tree / f"{number % 20:02}" / f"{number // 20 % 50:02}"
        directory.mkdir(parents=True, exist_ok=True)
        size = min(int(chance.lognormvariate(7.6, 1.3)), 1 << 20)
        (directory / f"file-{number:05}").write_bytes(chance.randbytes(size))


def make_inputs(directory):
    """The tree of 30,000 files, an image whose only layer is that tree, and a base image with next to nothing in it."""
    tree, many, base = directory / "tree", directory / "many", directory / "base"
    make_tree(tree)
    for image, content in ((many, tree), (base, directory / "small")):
        image.mkdir()
        content.mkdir(exist_ok=True)
        (content / "base-file").touch()
        layer = image / "layer.tar"
        run("tar", "--create", "--file", layer, "--format=posix", "--sort=name", "--directory", content, ".")
        write_image(layer, image)
    return tree, many, base


class Bench:
    """The measuring: cases in, samples out."""

    def __init__(self, tools, scratch, rounds, cold):
        self.tools, self.scratch, self.rounds, self.cold = tools, scratch, rounds, cold
        self.results = {}

    def order(self, tools, number):
        turned = tools[number % len(tools):] + tools[: number % len(tools)]
        return turned if number % 2 == 0 else turned[::-1]

    def measure(self, tool, command, warm_file=None):
        sync_filesystem(self.scratch)
        if self.cold:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        elif warm_file and warm_file.is_file():
            with open(warm_file, "rb") as file:
                digest_of(file)
        return timed(command, tool.root / "stdout", tool.root, tool.daemon)

    def load_case(self, case, image, archive):
        """Every run loads into a store that is new and empty."""
        samples = {}
        for number in range(self.rounds):
            for kind in self.order(self.tools, number):
                tool = kind(self.scratch / kind.name)
                try:
                    command = tool.load(image, archive)
                    if command:
                        sample = self.measure(tool, command, image / archive)
                        tool.check()
                        sample["disk"] = disk_usage(tool.root)
                        samples.setdefault(tool.name, []).append(sample)
                        progress(case, number, tool.name, sample)
                finally:
                    tool.stop()
        self.results[case] = samples

    def container_cases(self, base, tree, wanted):
        """One container per tool, with the tree written into it once; then every operation on it, round by round."""
        tools = []
        try:
            for kind in self.tools:
                tools.append(kind(self.scratch / kind.name))
                tools[-1].fill(base, tree)
            out = self.scratch / "out.tar"
            cases = {
                "diff": (lambda tool: tool.diff(), lambda tool: check_lines(tool)),
                "commit": (lambda tool: tool.commit(), lambda tool: tool.uncommit()),
                "export": (lambda tool: tool.export(out), lambda _: check_tar(out)),
            }
            for case, (command, after) in cases.items():
                if case in wanted:
                    self.container_case(case, tools, command, after)
        finally:
            for tool in tools:
                tool.stop()

    def container_case(self, case, tools, command, after):
        samples = {}
        for number in range(self.rounds):
            for tool in self.order(tools, number):
                if command(tool):
                    sample = self.measure(tool, command(tool))
                    after(tool)
                    samples.setdefault(tool.name, []).append(sample)
                    progress(case, number, tool.name, sample)
        self.results[case] = samples

    def save_case(self, case, image, archive):
        samples = {}
        out = self.scratch / "saved.tar"
        tools = [kind(self.scratch / kind.name) for kind in self.tools if kind.save is not Tool.save]
        try:
            for tool in tools:
                run(*tool.load(image, archive))
            for number in range(self.rounds):
                for tool in self.order(tools, number):
                    sample = self.measure(tool, tool.save(out))
                    assert out.stat().st_size > 1 << 20
                    out.unlink()
                    samples.setdefault(tool.name, []).append(sample)
                    progress(case, number, tool.name, sample)
        finally:
            for tool in tools:
                tool.stop()
        self.results[case] = samples


def check_lines(tool):
    lines = (tool.root / "stdout").read_bytes().count(b"\n")
    assert lines >= FILES, f"{tool.name}: the diff has {lines} lines"


def check_tar(out):
    members = run("tar", "--list", "--file", out).count("\n")
    assert members >= FILES, f"{out} has {members} entries"
    out.unlink()


def disk_usage(root):
    return int(run("du", "-sx", "--block-size=1", root).split()[0])


def progress(case, number, name, sample):
    print(f"{case} {number + 1}: {name} {sample['wall']:.2f} s", file=sys.stderr, flush=True)


def spread(values, digits):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(case, samples):
    ours = samples.get("graphdriver")
    lines = [
        f"### {case}\n",
        "| tool | wall s | ÷ graphdriver | CPU s | ÷ graphdriver | peak RSS MiB | disk MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in samples.items():
        ratio = {"wall": "", "cpu": ""}
        if ours and name != "graphdriver":
            for what in ratio:
                # A short command may use less CPU than the clock can tell.
                pairs = [theirs[what] / max(our[what], 0.001) for theirs, our in zip(runs, ours)]
                ratio[what] = spread(pairs, 2)
        wall, cpu = (spread([sample[what] for sample in runs], 2) for what in ("wall", "cpu"))
        peak = max(sample["peak"] for sample in runs) / 2**20
        disk = f"{runs[-1]['disk'] / 2**20:.0f}" if "disk" in runs[-1] else ""
        lines.append(f"| {name} | {wall} | {ratio['wall']} | {cpu} | {ratio['cpu']} | {peak:.0f} | {disk} |")
    return "\n".join(lines) + "\n"


def machine(directory, programs=("containerd", "podman", "umoci")):
    def version(*command):
        return run(*command).splitlines()[0]

    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": os.uname().release,
        "filesystem": run("stat", "-f", "-c", "%T", directory),
        **{program: version(program, "--version") for program in programs},
    }


CASES = ("docker", "oci", "oci-plain", "oci-zstd", "apply", "diff", "commit", "export", "save")
TOOLS = {kind.name: kind for kind in (Graphdriver, Containerd, Podman, Umoci)}


def arguments():
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphdriver"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphdriver", default=REPOSITORY / "target/release/graphdriver", type=Path, metavar="PATH")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--cases", default=",".join(CASES), help="of %(default)s", metavar="A,B")
    parser.add_argument("--tools", default=",".join(TOOLS), help="of %(default)s", metavar="A,B")
    parser.add_argument("--warm", action="store_true", help="leave the page cache as it is, with the archive in it")
    parser.add_argument("--dir", default=cache, type=Path, help="where stores and inputs are made (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write every sample there")
    given = parser.parse_args()
    given.cases, given.tools = given.cases.split(","), given.tools.split(",")
    for value, known in [(case, CASES) for case in given.cases] + [(tool, TOOLS) for tool in given.tools]:
        if value not in known:
            parser.error(f"{value}: not one of {', '.join(known)}")
    return given


def measure_all(given, scratch):
    bench = Bench([TOOLS[name] for name in given.tools], scratch, given.rounds, not given.warm)
    real = {"docker": "docker.tar", "oci": "oci.tar", "oci-plain": "oci-plain.tar", "oci-zstd": "oci-zstd.tar"}
    if set(real) & set(given.cases):
        image = Path(run(REPOSITORY / "scripts/make-image", given.dir))
        for case, archive in real.items():
            if case in given.cases:
                bench.load_case(case, image, archive)
    if set(given.cases) - set(real):
        tree, many, base = make_inputs(scratch)
        if "apply" in given.cases:
            bench.load_case("apply", many, "oci-plain.tar")
        if {"diff", "commit", "export"} & set(given.cases):
            bench.container_cases(base, tree, given.cases)
        if "save" in given.cases:
            bench.save_case("save", many, "oci-plain.tar")
    return bench.results


def main():
    given = arguments()
    if os.geteuid() != 0:
        raise SystemExit("peers.py: needs root, as containerd and `podman load` on overlay do")
    if "graphdriver" in given.tools and not given.graphdriver.exists():
        raise SystemExit(f"peers.py: {given.graphdriver} is not there: build it (cargo build --release) or name it")
    if os.environ.get("GRAPHDRIVER_BENCH_NAMESPACE") != "1":
        # Nothing that a peer leaves mounted or running may outlive this run, nor reach anybody else.
        os.environ["GRAPHDRIVER_BENCH_NAMESPACE"] = "1"
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp("unshare", ["unshare", *namespaces, sys.executable, *sys.argv])
    Graphdriver.binary = given.graphdriver.resolve()
    given.dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=given.dir.resolve()))
    try:
        results = measure_all(given, scratch)
    finally:
        shutil.rmtree(scratch)
    print("\n".join(table(case, samples) for case, samples in results.items()))
    if given.json:
        report = {"machine": machine(given.dir), "cold": not given.warm, "results": results}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
