"""Section `spec.model`: the model and the places of its files and downloads."""

import re
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from moe_operator.api.object_names import Name
from moe_operator.api.pods import SecretKey
from moe_operator.api.section import Rule, Section
from moe_operator.api.units import QuantityBetween

URI_SCHEMES = ("file", "hf", "pvc", "s3")

# Kubernetes does not change these fields of a claim.
IMMUTABLE = Field(
    json_schema_extra={"x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "cannot change"}]}
)

_URI_PATTERN = f"^({'|'.join(URI_SCHEMES)})://[^\\x00-\\x1f]+$"


def _check_uri(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in URI_SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(URI_SCHEMES)}")
    if not re.fullmatch(_URI_PATTERN, uri):
        raise ValueError(f"a URI such as hf://org/name, file:///folder or s3://bucket/folder is needed, got {uri!r}")
    return uri


class AccessMode(StrEnum):
    """From where a volume can be written."""

    READ_WRITE_MANY = "ReadWriteMany"
    READ_WRITE_ONCE = "ReadWriteOnce"


class WhenDeleted(StrEnum):
    """The fate of a claim when its resource is deleted, in the words of a StatefulSet."""

    RETAIN = "Retain"
    DELETE = "Delete"


class Cache(Section):
    """Where downloads from the hub are kept. Absent: the hub's own default folder. Only with `hf://`."""

    path: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=1024)] = Field(
        description="Absolute folder for downloads from the hub. It is passed on as HF_HUB_CACHE."
    )
    size: Annotated[str, QuantityBetween("1Mi", "100Ti", "200Gi")] | None = Field(
        default=None,
        description="Size of a PersistentVolumeClaim that the operator makes for it and all engines share. Only in a "
        "cluster; it can grow where the storage class allows it.",
    )
    storage_class: Annotated[Name, IMMUTABLE] | None = Field(
        default=None, description="Storage class of that claim. Absent: the cluster's default. It cannot change."
    )
    access_mode: Annotated[AccessMode, IMMUTABLE] = Field(
        default=AccessMode.READ_WRITE_MANY,
        description="Access mode of that claim; that of one which `claim` names is looked up. `ReadWriteOnce`, which "
        "one node can mount, puts all engines on one node (required pod affinity) and replaces them `inPlace`. It "
        "cannot change.",
    )
    when_deleted: WhenDeleted = Field(
        default=WhenDeleted.RETAIN,
        description="What happens to that claim when the resource is deleted. Another change never deletes it: without "
        "`size` it is kept, with its content, until a person deletes it or the same resource asks for it again.",
    )
    claim: Name | None = Field(
        default=None, description="A PersistentVolumeClaim that exists already, instead. Only in a cluster."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="claim",
            message="either a claim that exists or the size of a new one",
            cel="!has(self.claim) || !has(self.size)",
            holds=lambda cache: cache.claim is None or cache.size is None,
        ),
        Rule(
            field="storageClass",
            message="a storage class needs the size of the new claim",
            cel="!has(self.storageClass) || has(self.size)",
            holds=lambda cache: cache.storage_class is None or cache.size is not None,
        ),
    )


class Model(Section):
    """The model that is served."""

    uri: Annotated[
        str, Field(max_length=1024, json_schema_extra={"pattern": _URI_PATTERN}), AfterValidator(_check_uri)
    ] = Field(
        description="Where the weights are: `hf://org/name` on the hub, `file:///folder` on this machine (a relative "
        "`file://folder` is resolved against the folder of the YAML file; in a cluster a folder in the container), "
        "`pvc://claim/folder` on a PersistentVolumeClaim (only in a cluster), or `s3://bucket/folder`, which vLLM "
        "streams with the package runai-model-streamer."
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=253)] | None = Field(
        default=None, description="Name that clients put into `model`. Absent: the last part of the URI."
    )
    revision: Annotated[str, Field(min_length=1, max_length=253)] | None = Field(
        default=None,
        description="Branch, tag or commit on the hub. Absent: the hub's default branch. Only with `hf://`.",
    )
    token_secret: SecretKey | None = None
    cache: Cache | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="revision",
            message="a revision needs a uri that starts with hf://",
            cel="!has(self.revision) || self.uri.startsWith('hf://')",
            holds=lambda model: model.revision is None or model.uri.startswith("hf://"),
        ),
        Rule(
            field="cache",
            message="a cache needs a uri that starts with hf://",
            cel="!has(self.cache) || self.uri.startsWith('hf://')",
            holds=lambda model: model.cache is None or model.uri.startswith("hf://"),
        ),
        Rule(
            field="tokenSecret",
            message="a token needs a uri that starts with hf://",
            cel="!has(self.tokenSecret) || self.uri.startsWith('hf://')",
            holds=lambda model: model.token_secret is None or model.uri.startswith("hf://"),
        ),
    )

    @property
    def keeps_one_node(self) -> bool:
        """Whether the engines share a volume that one node alone can mount."""
        cache = self.cache
        has_volume = cache is not None and (cache.size is not None or cache.claim is not None)
        return cache is not None and has_volume and cache.access_mode is AccessMode.READ_WRITE_ONCE

    @property
    def served_name(self) -> str:
        """Name of the model in requests."""
        return self.name or self.uri.rstrip("/").rsplit("/", 1)[-1]
