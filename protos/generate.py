"""Write the Python code of the protocols: ``make protos``.

The code is checked in, so that an installation needs no compiler; a test compares it with what this writes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TARGETS = {
    "inference/open_inference.proto": "clients/trellis_clients/edge/generated",
    "trellis/v1/link.proto": "platform/trellis/wire/generated",
}
"""Where the code of each protocol goes, from the repository's root."""


def generate(proto: str) -> dict[str, str]:
    """Return the generated files of a protocol, by file name.

    Messages get a descriptor pool of their own: a process may hold another package's copy of the same standard
    protocol (tritonclient's, say), and two of one name do not fit into protobuf's default pool.
    """
    from grpc_tools import protoc

    source = ROOT / proto
    with tempfile.TemporaryDirectory() as folder:
        status = protoc.main(
            ["protoc", f"-I{source.parent}", f"--python_out={folder}", f"--pyi_out={folder}", source.name]
        )
        if status:
            raise SystemExit(f"protoc failed on {proto}")
        files = {path.name: path.read_text() for path in Path(folder).iterdir()}
    shared, own = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"
    code = f"{source.stem}_pb2.py"
    assert files[code].count(shared) == 1, "protoc's output has changed"
    return files | {code: files[code].replace(shared, own)}


def main() -> None:
    """Write every protocol's code to its place."""
    for proto, folder in TARGETS.items():
        for name, text in generate(proto).items():
            (ROOT.parent / folder / name).write_text(text)
            sys.stdout.write(f"{folder}/{name}\n")


if __name__ == "__main__":
    main()
