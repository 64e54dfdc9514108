"""HTTP routes of the node agent and of the gateway's admin port, and the times that both sides keep to."""

STATE, CONFIG, EXPERTS, DRAIN = "/v1/state", "/v1/config", "/v1/experts", "/v1/drain"
# Undoes a drain.
RESUME = "/v1/resume"
REQUESTS = "/v1/requests"
# The live page, below it its files, its stream of events and the record of a request.
UI = "/ui"
METRICS, READYZ, HEALTHZ = "/metrics", "/readyz", "/healthz"

# A rank takes a change at its next step; an agent answers 504 after the first time, and its client waits longer.
TAKE_TIMEOUT_S, CHANGE_TIMEOUT_S = 5.0, 10.0
READ_TIMEOUT_S, CONNECT_TIMEOUT_S = 5.0, 1.0
# A stream of states sends an empty line after the first time without a change; after the second its reader gives it up.
STREAM_HEARTBEAT_S, STREAM_SILENCE_S = 10.0, 25.0
# The whole experts document of a large model has some megabytes.
EXPERTS_TIMEOUT_S = 30.0
