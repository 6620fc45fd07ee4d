"""The guest as a machine: its image, its saved state, and QEMU processes that start from it.

Everything lies in one directory, $GRAPHDRIVER_GUEST_DIR or ~/.cache/graphdriver-guest-v1:

    image-KEY/           vmlinuz, initrd, root.erofs; KEY is of all that makes them (the files named in RECIPE)
    image-KEY/state-KEY  the booted machine; KEY is of QEMU's version and arguments, which a state must fit
    zfs-VERSION-KERNEL/  modules of ZFS
    run-*/               what one machine writes; its lock (flock) is held as long as it is in use
    lock                 held while any of this is made or cleared away
"""
import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import re
import select
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path(os.environ.get("GRAPHDRIVER_GUEST_DIR") or "~/.cache/graphdriver-guest-v1").expanduser().resolve()
RECIPE = ["prepare", "init", "agent"]
QEMU = "qemu-system-x86_64"
MEMORY_MIB = 2048
CPUS = 2
# Sparse. They belong to the saved state: a disk that changes its size is a changed machine.
DISKS = {"job": 1 << 30, "scratch": 16 << 30, "raw": 8 << 30}
BOOT_SECONDS = 300
UNUSED_SECONDS = 14 * 24 * 3600


class GuestError(Exception):
    """What to tell the user; no test has failed, but the guest could not be used."""


class TimedOut(GuestError):
    pass


def accelerator():
    """KVM where the processor really has it: below another hypervisor without, it aborts or hangs instead of failing."""
    flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    if flags and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


def arguments(image):
    """What all machines of an image have in common. isa-debug-exit is the way out with an exit code; vmgenid makes every
    restored machine draw random numbers of its own."""
    return [
        QEMU, "-machine", "q35", *accelerator(), "-smp", str(CPUS), "-m", str(MEMORY_MIB),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto",
        "-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd",
        "-append", "console=ttyS0 panic=-1 oops=panic quiet",
        "-drive", f"file={image}/root.erofs,if=none,id=root,format=raw,readonly=on,cache=unsafe",
        # The first disk, vda; those of DISKS follow in their order.
        "-device", "virtio-blk-pci,drive=root,serial=root",
    ]


def digest(*parts):
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


@contextlib.contextmanager
def locked():
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"guest: another run prepares the guest; waiting for it ({CACHE}/lock)", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare():
    """The directory of the image and the file of the state, made if they are not there."""
    image = CACHE / ("image-" + digest(*[(HERE / name).read_bytes() for name in RECIPE]))
    try:
        version = subprocess.run([QEMU, "--version"], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise GuestError(f"{QEMU} cannot be run: {error}\nrun scripts/setup guest") from error
    state = image / ("state-" + digest(version, repr((arguments(image), DISKS)).encode()))
    with locked():
        if not image.exists():
            clear_unused(image)
            if subprocess.run([HERE / "prepare", image]).returncode:
                raise GuestError("preparing the guest's image failed")
        if not state.exists():
            print("guest: booting it once, to save its state", file=sys.stderr, flush=True)
            for old in image.glob("state-*"):
                old.unlink()
        os.utime(image)
    # Outside the lock, as a machine takes it for its directory.
    if not state.exists():
        save_state(image, state)
    return image, state


def clear_unused(image):
    """Images of recipes that nobody has used for long."""
    for old in CACHE.glob("image-*"):
        if old != image and time.time() - old.stat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(old)


def save_state(image, state):
    with run_directory() as directory:
        (directory / "job").touch()
        (directory / "scratch").touch()
        with Machine(image, directory) as machine:
            answer = machine.control_line(BOOT_SECONDS)
            if answer != "READY":
                raise GuestError(f"the guest did not get ready: {answer!r}\n{machine.console()}")
            machine.qmp("stop")
            # The default is made for networks.
            machine.qmp("migrate-set-parameters", **{"max-bandwidth": 10 << 30})
            machine.qmp("migrate", uri=f"file:{directory}/state")
            while (status := machine.qmp("query-migrate").get("status")) != "completed":
                if status in ("failed", "cancelled"):
                    raise GuestError(f"the guest's state could not be saved; is there space in {CACHE}?")
                time.sleep(0.05)
        os.rename(directory / "state", state)


@contextlib.contextmanager
def run_directory():
    """A directory that goes at the end, and if this process is killed, with the next one that is made."""
    with locked():
        for left in CACHE.glob("run-*"):
            with contextlib.suppress(BlockingIOError, FileNotFoundError), directory_lock(left):
                shutil.rmtree(left)
        directory = pathlib.Path(tempfile.mkdtemp(prefix="run-", dir=CACHE))
        lock = directory_lock(directory)
        lock.__enter__()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.__exit__(None, None, None)


@contextlib.contextmanager
def directory_lock(directory):
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class Machine:
    """One QEMU process, from the boot or from the saved state; killed at the end of the `with` block at the latest."""

    def __init__(self, image, directory, state=None, raw=None):
        self.directory = directory
        control, guest_control = socket.socketpair()
        monitor, guest_monitor = socket.socketpair()
        self.output, guest_output = os.pipe()
        command = arguments(image)
        for name, size in DISKS.items():
            path = raw if name == "raw" and raw else directory / name
            with open(path, "ab") as disk:
                if disk.tell() > size:
                    raise GuestError(f"the disk {name} takes {disk.tell() >> 20} MiB, but has {size >> 20} MiB")
                disk.truncate(size)
            mode = "readonly=on" if name == "job" else "discard=unmap,detect-zeroes=unmap"
            command += ["-drive", f"file={path},if=none,id={name},format=raw,cache=unsafe,{mode}"]
            command += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        # The output as a file, which QEMU writes to at once: of a socket, the end would be lost when the machine ends.
        command += [
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=control,fd={guest_control.fileno()}",
            "-device", "virtserialport,chardev=control,name=control",
            "-chardev", f"file,id=output,path=/proc/self/fd/{guest_output},append=on",
            "-device", "virtserialport,chardev=output,name=output",
            "-chardev", f"socket,id=monitor,fd={guest_monitor.fileno()}", "-mon", "chardev=monitor,mode=control",
            "-chardev", f"file,id=console,path={directory}/console", "-serial", "chardev:console",
        ]
        if state:
            command += ["-incoming", f"file:{state}"]
        self.process = subprocess.Popen(
            # QEMU is not to outlive this process, however that ends.
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            pass_fds=[guest_control.fileno(), guest_monitor.fileno(), guest_output],
            # Its own session: Ctrl-C is for us, and we end it.
            start_new_session=True,
        )
        os.close(guest_output)
        guest_control.close()
        guest_monitor.close()
        self.control = control
        self.monitor = monitor.makefile("rw")
        monitor.close()

    def __enter__(self):
        try:
            self.monitor.readline()
            self.qmp("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.kill()
        os.close(self.output)
        self.control.close()
        with contextlib.suppress(OSError):
            self.monitor.close()

    def kill(self):
        """The power cut."""
        self.process.kill()
        self.process.wait()

    def qmp(self, command, **values):
        """One command of QEMU's monitor (QMP), and its answer."""
        try:
            self.monitor.write(json.dumps({"execute": command, "arguments": values}) + "\n")
            self.monitor.flush()
            for line in self.monitor:
                answer = json.loads(line)
                if "error" in answer:
                    raise GuestError(f"QEMU refuses {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
        except OSError:
            pass
        raise GuestError(f"QEMU ended at {command}; its message is above")

    def control_line(self, seconds):
        self.control.settimeout(seconds)
        line = b""
        try:
            while not line.endswith(b"\n"):
                data = self.control.recv(1)
                if not data:
                    break
                line += data
        except TimeoutError:
            raise TimedOut(f"the guest said nothing for {seconds} s\n{self.console()}") from None
        return line.decode(errors="replace").strip()

    def go(self):
        """Lets a restored machine begin with its job."""
        while (status := self.qmp("query-status")["status"]) not in ("running", "paused"):
            time.sleep(0.01)
        if status == "paused":
            self.qmp("cont")
        self.control.sendall(b"GO %d\n" % time.time())

    def relay(self, write, seconds):
        """Hands the output on until the machine has ended; its exit code. None if it runs on after these seconds."""
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            if not select.select([self.output], [], [], rest)[0]:
                break
            data = os.read(self.output, 1 << 16)
            if not data:
                return self.exit_code()
            write(data)
        return None

    def exit_code(self):
        code = self.process.wait()
        if code == 0:
            raise GuestError(f"the guest's kernel died; the end of its console:\n{self.console()}")
        if code < 3 or code % 2 == 0:
            raise GuestError(f"QEMU ended by itself with {code}; its message is above")
        return (code >> 1) - 1

    def console(self):
        return "\n".join((self.directory / "console").read_text(errors="replace").splitlines()[-60:])


def write_job(path, command, files, tidy):
    """The tar that the guest unpacks at its root: /job/command, and files as (source, absolute path in the guest)."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        def text(name, content):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))

        text("job/command", command.encode())
        if tidy:
            text("job/tidy", b"")
        for source, target in files:
            tar.add(source, str(target).lstrip("/"), filter=as_root)


def as_root(entry):
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    # Anybody in the guest may read what was sent, as tests drop their privileges.
    entry.mode |= 0o555 if entry.isdir() or entry.mode & 0o100 else 0o444
    return entry


def run(command, files, seconds, write, tidy=True, raw=None):
    """Runs a shell script in a machine of its own from the saved state, with these files; its exit code, or None."""
    image, state = prepare()
    with run_directory() as directory:
        write_job(directory / "job", command, files, tidy)
        make_scratch(directory / "scratch")
        with Machine(image, directory, state, raw) as machine:
            machine.go()
            return machine.relay(write, seconds)


def make_scratch(path):
    """An ext4 as most hosts have it, made here, where the processor is fast."""
    with open(path, "wb") as file:
        file.truncate(DISKS["scratch"])
    options = "lazy_itable_init=0,assume_storage_prezeroed=1,nodiscard"
    made = subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", options, path], env={**os.environ, "PATH": path_with_sbin()})
    if made.returncode:
        raise GuestError("mke2fs could not make the scratch disk")


def path_with_sbin():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
