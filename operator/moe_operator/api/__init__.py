"""The MoEServing resource: its models, the way in and out of YAML, and the settings that it asks for."""

from moe_operator.api.document import load_document
from moe_operator.api.engine import Runtime
from moe_operator.api.parse import (
    dump_resource,
    load_resource,
    parse_resource,
    parse_resource_of,
    resource_document,
    set_field,
)
from moe_operator.api.resource import API_VERSION, KIND, MoEServing
from moe_operator.api.scheduling import engine_settings, expert_settings, request_settings
from moe_operator.api.status import (
    Condition,
    ConditionStatus,
    EnginePhase,
    EngineStatus,
    PoliciesInForce,
    Status,
    status_document,
)

__all__ = [
    "API_VERSION",
    "KIND",
    "Condition",
    "ConditionStatus",
    "EnginePhase",
    "EngineStatus",
    "MoEServing",
    "PoliciesInForce",
    "Runtime",
    "Status",
    "dump_resource",
    "engine_settings",
    "expert_settings",
    "load_document",
    "load_resource",
    "parse_resource",
    "parse_resource_of",
    "request_settings",
    "resource_document",
    "set_field",
    "status_document",
]
