"""A revision of the engines: the part of the resource that only a start can change. Pure.

Two revisions stand side by side under a canary, so the stable one is written down (in the ConfigMap of settings) and
read back. Settings that a running engine can change (the order of requests) and settings
outside the engine are left out.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api.parse import parse_resource, resource_document
from moe_operator.api.resource import MoEServing

# Roles reach the engines of both revisions: those of one alone could exchange no blocks with the others.
_NOT_OF_A_REVISION = ("replicas", "roles", "canary", "update")
# Of the placement of experts the one field that a start alone can change.
_REDUNDANT = "redundantExperts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """The sections `model` and `engine` of a resource without what a start does not change, and copies of experts."""

    document: dict[str, Any]

    @property
    def digest(self) -> str:
        """Equal for revisions that start the same engine."""
        return sha256(self.text.encode()).hexdigest()[:10]

    @property
    def text(self) -> str:
        """As it is written down."""
        return json.dumps(self.document, sort_keys=True)


def build_revision(resource: MoEServing) -> Revision:
    """The revision that a resource asks for."""
    # Without defaults: the API server writes them into the resource, a file leaves them out, both mean the same.
    spec = resource.model_dump(mode="json", by_alias=True, exclude_defaults=True)["spec"]
    engine = {name: value for name, value in spec.get("engine", {}).items() if name not in _NOT_OF_A_REVISION}
    redundant = resource.spec.scheduling.expert.redundant_experts
    model = dict(spec["model"])
    if isinstance(model.get("cache"), dict):
        # The end of the claim concerns no engine.
        model["cache"] = {name: value for name, value in model["cache"].items() if name != "whenDeleted"}
    return Revision(document={"model": model, "engine": engine, **({_REDUNDANT: redundant} if redundant else {})})


def parse_revision(text: str) -> Revision | None:
    """A revision that was written down; None when it is none, as after an upgrade that no longer knows a field."""
    try:
        document = json.loads(text)
        known = ("model", "engine", *([_REDUNDANT] if _REDUNDANT in document else []))
        revision = Revision(document={name: document[name] for name in known})
        parse_resource(_with_sections({}, revision, name="probe"))
    except (ValueError, KeyError, TypeError, InvalidInput):
        return None
    return revision


def at_revision(resource: MoEServing, revision: Revision) -> MoEServing:
    """The resource with the engines of a revision; replicas, update and all else stay as they are.

    Of its own revision it is the resource itself: both read as the same, and reading takes an eighth of a plan.

    Raises:
        InvalidInput: the engines of that revision cannot have what the resource asks of all engines, such as roles.
    """
    if revision == build_revision(resource):
        return resource
    try:
        return parse_resource(_with_sections(resource_document(resource), revision, name=resource.metadata.name))
    except InvalidInput as error:
        advice = "set weight to 100 or remove the canary, or change that part once the canary has ended"
        message = f"the stable engines cannot have what is asked of all engines: {error.errors[0]}; {advice}"
        raise InvalidInput([InputError("spec.engine.canary", message)]) from None


def _with_sections(document: dict[str, Any], revision: Revision, *, name: str) -> dict[str, Any]:
    spec = document.get("spec", {})
    kept = {key: value for key, value in spec.get("engine", {}).items() if key in _NOT_OF_A_REVISION}
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": name}}
    sections = {"model": revision.document["model"], "engine": {**revision.document["engine"], **kept}}
    scheduling = spec.get("scheduling", {})
    redundant = revision.document.get(_REDUNDANT, 0)
    if redundant != scheduling.get("expert", {}).get(_REDUNDANT, 0):
        sections["scheduling"] = {**scheduling, "expert": {**scheduling.get("expert", {}), _REDUNDANT: redundant}}
    return {**header, **document, "spec": {**spec, **sections}}
