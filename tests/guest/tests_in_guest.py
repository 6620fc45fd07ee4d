"""Test binaries in the guest: what goes along with one, its environment, and what its output says."""
import os
import pathlib
import re
import shlex
import sys

import machine

# Handed on from the developer's environment, so that a test can be told things; these name things of the host.
ENVIRONMENT = re.compile(r"(GRAPHDRIVER|PROPTEST|RUST)_\w+|CI")
OF_THE_HOST = {"GRAPHDRIVER_GUEST_DIR", "GRAPHDRIVER_SKIP_LOG", "GRAPHDRIVER_TEST_NAMESPACE", "RUST_LOG_FILE"}
SECONDS = 1500
RUNNING = re.compile(r"^running (\d+) tests?$", re.M)
# libtest's and libtest-mimic's "ignored", and what tests/skip prints.
IGNORED = re.compile(r"^test (.*?) +\.\.\. ignored,? ?(.*)$|^skipped: (.*?): (.*)$", re.M)


class Output:
    """Hands output on to standard output, counts tests and remembers what has been ignored."""

    def __init__(self):
        self.tests = 0
        self.ignored = []
        self.rest = b""

    def write(self, data):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        whole, newline, self.rest = (self.rest + data).rpartition(b"\n")
        text = (whole + newline).decode(errors="replace")
        self.tests += sum(map(int, RUNNING.findall(text)))
        for found in IGNORED.finditer(text):
            name, reason = (text or "" for text in (found.groups()[:2] if found[1] else found.groups()[2:]))
            self.ignored.append(f"{name}: {reason}" if reason else name)


def environment(package, required):
    given = {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}
    return {
        "RUST_BACKTRACE": "1",
        # A sequence takes the guest's slow processor many seconds, and scripts/test runs more of them.
        "GRAPHDRIVER_PROPTEST_CASES": "4",
        # What the guest is for has to run there.
        **({"GRAPHDRIVER_REQUIRE_ALL": "1"} if required else {}),
        **{name: value for name, value in given.items() if name not in OF_THE_HOST},
        "GRAPHDRIVER_GUEST": "1",
        # A whole disk that belongs to the test, 8 GiB, empty.
        "GRAPHDRIVER_GUEST_DISK": "/dev/vdd",
        "TMPDIR": "/var/tmp",
        "CARGO_MANIFEST_DIR": str(package),
    }


def run_test(binary, package, arguments, programs, output, seconds, required=False):
    """Runs a test binary of the package in this directory; its exit code. With `required` what cannot run fails. What it needs is at the same paths in the guest:
    itself, the programs that it finds by CARGO_BIN_EXE_* or beside itself, and the samples among the package's tests."""
    binary = pathlib.Path(binary).resolve()
    files = [(path, path) for path in [binary, *programs]]
    if (package / "tests").is_dir():
        files.append((package / "tests", package / "tests"))
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment(package, required).items())
    command = f"#!/bin/bash\n{exports}mkdir -p {shlex.quote(str(package))}\ncd {shlex.quote(str(package))} || exit 125\n"
    command += "exec " + shlex.join([str(binary), *arguments]) + "\n"
    code = machine.run(command, files, seconds, output.write)
    if code is None:
        sys.stdout.write("\n")
        raise machine.TimedOut(
            f"{binary.name} {shlex.join(arguments)} was still running after {seconds} s and was ended.\n"
            "--timeout SECONDS gives it more; a test's name as filter shows which one hangs")
    return code
