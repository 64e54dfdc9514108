"""What a tenant may not ask of `/v1/responses`. Pure.

A response has one owner, whom the gateway knows by the id that the engine chose. A response that is computed in the
background goes on after its answer, where the gateway neither sees its end nor its tokens.
"""

from moe_contract.access_config import Quota

from moe_gateway.access.denials import Denial, deny_field
from moe_gateway.request.parsing import Parsed

OWN_ID = "the id of a response is chosen by the server here; leave request_id away"
BACKGROUND = "background responses are not possible with a limit of {}: they go on after their answer"


def refuse_fields(parsed: Parsed, quota: Quota) -> Denial | None:
    """The answer to a body that chooses its own id, or that would escape the bounds of this quota; None: it passes."""
    if parsed.names_itself:
        return deny_field(OWN_ID, "request_id")
    if parsed.background and (quota.concurrency is not None or quota.tokens_per_minute is not None):
        bound = "requests at a time" if quota.concurrency is not None else "tokens a minute"
        return deny_field(BACKGROUND.format(bound), "background")
    return None
