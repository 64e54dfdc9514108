"""What a tiny model is made from, and the manifest in its folder that says so.

The fingerprint covers everything that shapes the weights but the machine's own text; a folder whose manifest has
another one is made anew.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "moeserving-tiny.json"
RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySettings:
    """Shape and training of the model. `steps` of 0 leaves the weights random; `limit_s` ends a slow training early."""

    steps: int = 100
    limit_s: float = 55.0
    seed: int = 20
    batch_sequences: int = 4
    sequence_tokens: int = 256
    learning_rate: float = 3e-3
    balance_weight: float = 0.05
    vocabulary: int = 4096
    layers: int = 4
    experts: int = 16
    experts_per_token: int = 2
    hidden: int = 256
    expert_hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    context_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.steps < 0 or self.limit_s <= 0:
            raise ValueError(f"steps must be 0 or more and limit_s more than 0, got {self.steps} and {self.limit_s}")

    @property
    def fingerprint(self) -> str:
        """Equal for equal settings of the same recipe."""
        text = json.dumps({"recipe": RECIPE_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_report(directory: Path) -> dict[str, Any] | None:
    """The manifest of a finished model; None where there is none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_manifest(directory: Path, settings: TinySettings, report: dict[str, Any]) -> None:
    """Written last: a folder with a manifest is complete."""
    manifest = {"fingerprint": settings.fingerprint, "settings": asdict(settings), "report": report}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
