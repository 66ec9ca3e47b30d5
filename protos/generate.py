"""Generate the Python stubs of protos/v1alpha1/service.proto.

`python protos/generate.py` writes provider/v1alpha1/; with a directory as its argument it writes the same
package tree below that directory instead, which is how the drift test compares without touching the checkout.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("service_pb2.py", "service_pb2.pyi", "service_pb2_grpc.py", "service_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Write the files named in GENERATED to `out`/provider/v1alpha1/; RuntimeError when protoc fails."""
    package = out / "provider" / "v1alpha1"
    package.mkdir(parents=True, exist_ok=True)
    # protoc finds the typing plugins by PATH, and they are installed beside this interpreter.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    arguments = [
        "protoc",
        # The virtual path makes the generated modules import each other as provider.v1alpha1, not v1alpha1.
        f"-Iprovider/v1alpha1={ROOT / 'protos' / 'v1alpha1'}",
        f"-I{importlib.resources.files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        "provider/v1alpha1/service.proto",
    ]
    status = protoc.main(arguments)
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}")
    missing = [name for name in GENERATED if not (package / name).is_file()]
    if missing:
        raise RuntimeError(f"protoc did not write {', '.join(missing)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
