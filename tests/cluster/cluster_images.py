"""Images without a registry: a folder becomes an archive that containerd imports.

The archive is written straight to disk: the layer's size and digest are known only after it, so its header is filled in
then.
"""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Defaults of its containers. `name` is full: with registry and tag."""

    name: str
    entrypoint: Sequence[str] = ()
    user: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": PATH})


class HashingWriter:
    """Passes on written bytes, and knows their SHA-256 and length."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._hash = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.length += len(data)
        return self._output.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def write_archive(image: Image, root: Path, archive: Path) -> None:
    """One-layer docker archive of the folder `root`."""
    with archive.open("wb") as output:
        output.write(bytes(tarfile.BLOCKSIZE))
        layer = HashingWriter(output)
        with tarfile.open(fileobj=layer, mode="w|") as tar:
            tar.add(root, arcname=".")
        output.write(bytes(-layer.length % tarfile.BLOCKSIZE))
        config = json.dumps(config_of(image, layer.digest())).encode()
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        manifest = json.dumps([{"Config": name, "RepoTags": [image.name], "Layers": ["layer.tar"]}]).encode()
        with tarfile.open(fileobj=output, mode="w|") as tar:
            for member, content in ((name, config), ("manifest.json", manifest)):
                tar.addfile(header(member, len(content)), io.BytesIO(content))
        output.seek(0)
        output.write(header("layer.tar", layer.length).tobuf(tarfile.GNU_FORMAT))


def header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def config_of(image: Image, layer_digest: str) -> dict[str, object]:
    return {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Entrypoint": list(image.entrypoint),
            "Env": [f"{name}={value}" for name, value in image.environment.items()],
            "User": image.user,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
    }
