"""Rights of the user in a namespace, each with its use."""

from dataclasses import dataclass

from moe_contract.api_server import ApiError, Document, Kind

from moe_operator.api.crd import GROUP, PLURAL
from moe_operator.doctor.check import Check, note, ok, problem

REVIEW = Kind("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", namespaced=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """One right.

    Attributes:
        verb: of the API.
        resource: in the plural, with its subresource after a slash.
        purpose: the commands that need it.
        group: API group; empty for the core group.
        required: without it the user cannot even look at resources.
    """

    verb: str
    resource: str
    purpose: str
    group: str = ""
    required: bool = False

    @property
    def name(self) -> str:
        """Verb and resource, such as `get secrets`."""
        return f"{self.verb} {self.resource}"


RIGHTS = (
    Right(verb="get", resource=PLURAL, group=GROUP, required=True, purpose="`kubectl get moes NAME`"),
    Right(verb="list", resource=PLURAL, group=GROUP, required=True, purpose="`kubectl get moes`"),
    Right(verb="create", resource=PLURAL, group=GROUP, required=True, purpose="`kubectl apply` of a new MoEServing"),
    Right(verb="list", resource="pods", purpose="`moeserving experts`, `explain` and `ui`, which look for the pods"),
    Right(verb="get", resource="secrets", purpose="`moeserving experts`, `explain` and `ui`: the control token"),
    Right(
        verb="create", resource="pods/portforward", purpose="`moeserving experts`, `explain` and `ui`: the way to a pod"
    ),
)


def review_of(right: Right, namespace: str) -> Document:
    """The question to the API server whether the user has a right."""
    resource, _, subresource = right.resource.partition("/")
    attributes = {
        "namespace": namespace,
        "verb": right.verb,
        "group": right.group,
        "resource": resource,
        "subresource": subresource,
    }
    return {
        "apiVersion": REVIEW.api_version,
        "kind": REVIEW.name,
        "metadata": {},
        "spec": {"resourceAttributes": attributes},
    }


def check_right(right: Right, namespace: str, allowed: bool | ApiError) -> Check:
    """Whether the user has a right; a right that only some commands need is a note where it is missing."""
    name = f"right: {right.name}"
    if isinstance(allowed, ApiError):
        return note(name, f"not known: {allowed}")
    if allowed:
        return ok(name, f"yes, in the namespace {namespace}")
    group = f" of the group {right.group}" if right.group else ""
    advice = (
        f"ask the administrator for a Role in {namespace} with the verb `{right.verb}` on `{right.resource}`{group}"
    )
    finding = f"missing in the namespace {namespace}; needed for {right.purpose}"
    return problem(name, finding, advice) if right.required else note(name, finding, advice)
