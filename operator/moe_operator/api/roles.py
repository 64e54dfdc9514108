"""Section `spec.engine.roles`: whether one engine may compute a prompt whose answer another one decodes.

A section, though a word or two numbers would do: a CRD has one type for a field, and the API server can then check each
part and name it.
"""

from enum import StrEnum
from typing import Annotated, ClassVar

from moe_scheduling.engine.disaggregation import EngineRole
from pydantic import Field

from moe_operator.api.replica import RoleOverride, RoleOverrides
from moe_operator.api.section import Count, Rule, Section

_MOST = 255


class RoleMode(StrEnum):
    """Who decides which engine computes prompts and which decodes."""

    UNIFIED = "unified"
    AUTO = "auto"
    FIXED = "fixed"


class Roles(Section):
    """Prefill and decode apart: one engine computes the prompt, its KV blocks travel, another one decodes."""

    mode: RoleMode = Field(
        default=RoleMode.UNIFIED,
        description="`unified`: an engine serves a request as a whole. `auto`: all engines are alike, and the gateway "
        "chooses one or two for each request, and moves preferences with the load. `fixed`: `prefill` engines compute "
        "prompts and `decode` engines decode, in a cluster each a Deployment of its own.",
    )
    prefill: Annotated[Count, Field(ge=1, le=_MOST)] | None = Field(
        default=None, description="Engines that compute prompts. Only with the mode `fixed`, which needs both numbers."
    )
    decode: Annotated[Count, Field(ge=1, le=_MOST)] | None = Field(
        default=None, description="Engines that decode. Only with the mode `fixed`, which needs both numbers."
    )
    overrides: RoleOverrides | None = Field(
        default=None,
        description="What engines of one role have for themselves, laid over `engine`. Only with the mode `fixed`.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="mode",
            message="the mode fixed needs prefill and decode, the numbers of engines; no other mode has them",
            cel="self.mode == 'fixed' ? has(self.prefill) && has(self.decode) : "
            "!has(self.prefill) && !has(self.decode)",
            holds=lambda roles: (
                None not in (roles.prefill, roles.decode)
                if roles.mode is RoleMode.FIXED
                else roles.prefill is roles.decode is None
            ),
        ),
        Rule(
            field="overrides",
            message="resources and arguments of a role need the mode fixed, for only then has an engine one role",
            cel="self.mode == 'fixed' || !has(self.overrides)",
            holds=lambda roles: roles.mode is RoleMode.FIXED or roles.overrides is None,
        ),
    )

    def override(self, role: EngineRole) -> RoleOverride:
        """Returns what engines of a role have for themselves; nothing for engines of all roles."""
        if self.overrides is None or role is EngineRole.UNIFIED:
            return RoleOverride()
        return self.overrides.prefill if role is EngineRole.PREFILL else self.overrides.decode

    @property
    def is_fixed(self) -> bool:
        """Whether each engine has one role for its life."""
        return self.mode is RoleMode.FIXED

    @property
    def apart(self) -> bool:
        """Whether KV blocks may travel between engines."""
        return self.mode is not RoleMode.UNIFIED
