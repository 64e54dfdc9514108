"""Settings of agents and gateways as JSON values: for their settings files, and for those that run. Pure.

Fields that came after a release are left out where they have their defaults: pods of the release before start with the
same file while a resource is upgraded, and refuse a field that they do not know.

Invariant: a control body says a field that is left out where the value in force is another one, since there an absent
field keeps its value.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

Section = dict[str, Any]
_LATER: Mapping[str, Section] = {"request": {"inter_token_s": None}, "dispatch": {"targets": {}}}
# The other fields of the targets are no settings.
_BOUNDS = ("ttft_s", "inter_token_s")


def as_json(settings: Any) -> Section:
    """Returns a settings object of the core as JSON values, without later fields that have their defaults."""
    return _without_defaults(asdict(settings))


def differs_from(wanted: Mapping[str, Any], in_force: Mapping[str, Any]) -> bool:
    """Returns whether the settings in force are not the wanted ones, section by section."""
    return any(_comparable(in_force.get(name)) != _comparable(value) for name, value in wanted.items())


def build_body(wanted: Mapping[str, Any], in_force: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the control body that makes settings the ones in force.

    Args:
        wanted: sections, as the plan has them.
        in_force: sections of the peer; one that this release cannot read is absent.
    """
    return {name: _with_defaults(name, value, in_force.get(name)) for name, value in wanted.items()}


def _with_defaults(name: str, section: Any, in_force: Section | None) -> Any:
    later = _LATER.get(name, {})
    present = later if in_force is None else _without_defaults(in_force)
    said = {field: default for field, default in later.items() if field in present}
    return said | section if said else section


def _comparable(section: Any) -> Any:
    return _without_defaults(section) if isinstance(section, dict) else section


def _without_defaults(section: Section) -> Section:
    section = dict(section)
    if isinstance(targets := section.get("targets"), dict):
        section["targets"] = {name: targets[name] for name in _BOUNDS if targets.get(name) is not None}
    later = {field: default for fields in _LATER.values() for field, default in fields.items()}
    return {name: value for name, value in section.items() if name not in later or value != later[name]}
