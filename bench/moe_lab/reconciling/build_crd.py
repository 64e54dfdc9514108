"""The CRD of a build: each is measured with its own, for the API server fills in the defaults of the CRD that it has.

A build that does not know a field which another's CRD fills in would refuse every resource.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

Document = dict[str, Any]
_PRINT = "import json; from moe_operator.api.crd import build_crd; print(json.dumps(build_crd()))"


def read_crd(python: Path) -> Document:
    """The CRD of the build whose environment has this interpreter.

    Raises:
        RuntimeError: the environment has no operator.
    """
    try:
        done = subprocess.run([python, "-c", _PRINT], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().rpartition("\n")[2]
        raise RuntimeError(f"{python} gives no CRD: {last}") from None
    return dict(json.loads(done.stdout))
