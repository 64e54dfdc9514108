"""`python -m moe_operator.krew_manifest WHEEL --uri URI`: prints the manifest with which krew installs the plugin.

A wheel is a zip archive, which krew can unpack; its `bin` is the wheel's own launcher. For an index of krew plugins the
manifest lies there as `plugins/moeserving.yaml`. Its fields: https://krew.sigs.k8s.io/docs/developer-guide/plugin-manifest/
"""

import argparse
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

LAUNCHER = "moe_operator/cli/krew_plugin.sh"
# One wheel for all: it has no compiled module of its own.
PLATFORMS = (("linux", "amd64"), ("linux", "arm64"), ("darwin", "amd64"), ("darwin", "arm64"))
_CAVEATS = """It runs with python3 (3.11 to 3.13) on PATH, or the one that MOESERVING_PYTHON names. Packages for it:
  python3 -m pip install 'moeserving[operator]'
"""


def build_manifest(digest: str, uri: str, release: str) -> dict[str, Any]:
    """Returns the manifest.

    Args:
        digest: SHA-256 of the wheel, in hex.
        uri: from where krew downloads it.
        release: version, as `0.1.0`.
    """
    return {
        "apiVersion": "krew.googlecontainertools.github.com/v1alpha2",
        "kind": "Plugin",
        "metadata": {"name": "moeserving"},
        "spec": {
            "version": f"v{release}",
            "homepage": "https://moeserving.dev/",
            "shortDescription": "Look at and operate MoEServing deployments",
            "description": "Live screen, reasons of a request's engine, experts, roles, drains and a doctor for\n"
            "Mixture-of-Experts models that MoEServing serves.\n",
            "caveats": _CAVEATS,
            "platforms": [
                {
                    "selector": {"matchLabels": {"os": system, "arch": processor}},
                    "uri": uri,
                    "sha256": digest,
                    "bin": LAUNCHER,
                }
                for system, processor in PLATFORMS
            ],
        },
    }


def main() -> None:
    """Prints the manifest of a wheel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--uri", required=True, help="from where krew downloads the wheel")
    given = parser.parse_args()
    digest = hashlib.sha256(given.wheel.read_bytes()).hexdigest()
    print(yaml.safe_dump(build_manifest(digest, given.uri, version("moeserving")), sort_keys=False), end="")


if __name__ == "__main__":
    main()
