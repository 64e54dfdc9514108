"""What changed between two moments of the live page, as events. Pure."""

from collections.abc import Iterator
from typing import Any

from moe_contract.gateway_config import GatewaySettings
from moe_contract.live_page import LiveSnapshot, PageEvent


def list_changes(before: LiveSnapshot | None, after: LiveSnapshot) -> list[PageEvent]:
    """The events between two snapshots: findings that began or ended, engines that came or went."""
    if before is None:
        return []
    old = {row.kind: row for row in before.findings}
    new = {row.kind: row for row in after.findings}
    at_s = after.at_s
    began = [
        PageEvent(at_s=at_s, message=row.message, severity=row.severity) for kind, row in new.items() if kind not in old
    ]
    ended = [PageEvent(at_s=at_s, message=f"Over: {row.message}") for kind, row in old.items() if kind not in new]
    names = {row.name for row in before.engines}, {row.name for row in after.engines}
    came = [PageEvent(at_s=at_s, message=f"New engine: {name}.") for name in sorted(names[1] - names[0])]
    gone = [PageEvent(at_s=at_s, message=f"Engine gone: {name}.") for name in sorted(names[0] - names[1])]
    return [*began, *ended, *came, *gone]


def list_changed_settings(
    before: GatewaySettings, after: GatewaySettings, at_s: float, *, was_seen: bool
) -> list[PageEvent]:
    """An event for each setting of the gateway that has another value, by its name in `PUT /v1/config`.

    Engines come and go as such; a group (a revision of the engines) has its weight.

    Args:
        before: the settings at the last look.
        after: the settings now.
        at_s: time of the events.
        was_seen: whether a page was open at the last look.
    """
    if before is after:
        return []
    old, new = (dict(_flatten("", _document(settings))) for settings in (before, after))
    when = "" if was_seen else ", while no page was open"
    return [
        PageEvent(at_s=at_s, message=f"Setting {name}: {_describe(old.get(name))} → {_describe(new.get(name))}{when}.")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _document(settings: GatewaySettings) -> dict[str, Any]:
    document = settings.document()
    weights = {row["service"]: {"weight": row["weight"]} for row in document.get("groups", [])}
    return {"dispatch": document["dispatch"], "request": document["request"], "groups": weights}


def _flatten(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _flatten(f"{path}.{name}" if path else name, inner)


def _describe(value: Any) -> str:
    return "none" if value is None else str(value)
