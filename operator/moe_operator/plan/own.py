"""What of a pod is the operator's own, and may be neither removed nor replaced by a pod template. Pure.

The operator, the gateways and the agents rely on it: the containers by name, their ports by name and number, the
folders of configuration, token and settings, and variables that a field of the resource sets.
"""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_contract.engine_process import EXPERT_GROUP_VARIABLE, KV_TRANSFER_VARIABLE, RUN_DIR_VARIABLE
from moe_contract.input_errors import InputError, render_choices

from moe_operator.plan.pod_environment import HOME_VOLUME, TEMPORARY_VOLUME

Document = dict[str, Any]

# Scratch space may be given another size, medium or kind of disk, and folders in it may be mounts of their own.
_SCRATCH_SOURCES = {"emptyDir", "ephemeral"}
# Another volume may be mounted in their place.
_REPLACEABLE_VOLUMES = {HOME_VOLUME, TEMPORARY_VOLUME}
# The beginning of the names of volumes with Secrets.
SECRET_VOLUME = "secret-"
_CLOSED_VOLUMES = {"config", "control", "settings", "run", "shm", "models"}
_RESERVED_ENV = {RUN_DIR_VARIABLE, EXPERT_GROUP_VARIABLE, KV_TRANSFER_VARIABLE}
# Of a container, where nothing but these may lie, or may be mounted at all.
_SYSTEM_FOLDERS = ("/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr")
_KERNEL_FOLDERS = ("/dev", "/proc", "/sys")


def find_clashes(
    base: Document, patch: Mapping[str, Any], merged: Document, path: str, fields: Mapping[str, str]
) -> Iterator[InputError]:
    """Clashes of a pod template with the operator's own pod.

    Args:
        base: the operator's pod template.
        patch: the user's, valid by itself.
        merged: the one with the other laid over.
        path: of the user's template.
        fields: variables that the operator sets in its own way, and the field that sets each.
    """
    own, given, spec = base["spec"], patch.get("spec", {}), merged.get("spec", {})
    containers = {row["name"]: row for row in spec.get("containers") or ()}
    yield from _volume_clashes(own["volumes"], given.get("volumes"), spec.get("volumes") or (), f"{path}.spec.volumes")
    for container in own["containers"]:
        name = container["name"]
        place, theirs = _find_entry(given.get("containers"), name, f"{path}.spec.containers")
        if name not in containers:
            yield InputError(place, f"the container {name!r} is the operator's own and cannot be removed")
            continue
        yield from _port_losses(container, containers[name], place)
        for kind in ("containers", "initContainers"):
            yield from _port_clashes(container, given.get(kind), f"{path}.spec.{kind}")
        yield from _mount_clashes(container, theirs, containers[name], f"{place}.volumeMounts")
        yield from _env_clashes(container, theirs, containers[name], f"{place}.env", fields)
    yield from _name_clashes(spec, f"{path}.spec.initContainers")
    for kind in ("containers", "initContainers"):
        yield from _gaps(
            spec, given.get(kind), kind, f"{path}.spec.{kind}", ", ".join(row["name"] for row in own["containers"])
        )


def check_gateway_token(spec: Mapping[str, Any], path: str) -> Iterator[InputError]:
    """Why a gateway could not ask the API server which engines there are; nothing where it can.

    Args:
        spec: of its pod, with the user's part.
        path: of the user's part.
    """
    sources = (
        source for row in spec.get("volumes") or () for source in (row.get("projected") or {}).get("sources") or ()
    )
    has_other = any("serviceAccountToken" in source for source in sources)
    if spec.get("automountServiceAccountToken") is False and not has_other:
        message = "gateways read with the token of their ServiceAccount which engines there are"
        yield InputError(f"{path}.automountServiceAccountToken", message)


def check_cache_path(path: str, mounts: Sequence[Document]) -> Iterator[InputError]:
    """Why the folder of downloads cannot be mounted beside the operator's own folders."""
    normal, field = normal_path(path), "spec.model.cache.path"
    own = next((row for row in mounts if _overlap(normal, row["mountPath"], closed=_is_closed(row["name"]))), None)
    if own is not None:
        yield InputError(field, f"{path} is, holds or lies in {own['mountPath']}, a folder of the deployment's own")
    elif normal in _SYSTEM_FOLDERS or any(_is_below(normal, folder) for folder in _KERNEL_FOLDERS):
        yield InputError(field, f"{path} is a folder of the system; take one of its own, such as /cache")
    elif ":" in path:
        yield InputError(field, f"a folder without a colon is needed in a cluster, got {path!r:.80}")


def normal_path(path: str) -> str:
    """The path without what means nothing: doubled and trailing slashes, `.` and `..`."""
    return posixpath.normpath("/" + path.lstrip("/"))


def _is_closed(volume: str) -> bool:
    return volume in _CLOSED_VOLUMES or volume.startswith(SECRET_VOLUME)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _overlap(path: str, own: str, *, closed: bool) -> bool:
    """Whether a mount at the path hides the own folder, or lies in one that is closed."""
    own = normal_path(own)
    return path == own or _is_below(own, path) or (closed and _is_below(path, own))


def _find_entry(entries: Any, name: str, path: str) -> tuple[str, Mapping[str, Any]]:
    """The place and the text of a user's entry; the list itself where there is none."""
    for index, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        if isinstance(entry, Mapping) and entry.get("name") == name:
            return f"{path}[{index}]", entry
    return path, {}


def _volume_clashes(own: Sequence[Document], given: Any, merged: Sequence[Document], path: str) -> Iterator[InputError]:
    found = {row["name"]: row for row in merged}
    for volume in own:
        name = volume["name"]
        place, _ = _find_entry(given, name, path)
        if name not in found:
            yield InputError(place, f"the volume {name!r} is the operator's own and cannot be removed")
        elif found[name] != volume and not (_is_scratch(volume) and _is_scratch(found[name])):
            yield InputError(place, f"the volume {name!r} is the operator's own; give yours another name")


def _is_scratch(volume: Document) -> bool:
    return bool(volume.keys() - {"name"} <= _SCRATCH_SOURCES)


def _port_losses(own: Document, merged: Document, place: str) -> Iterator[InputError]:
    """The own ports keep their names and protocols, by which Services and the operator find them."""
    wanted = _own_ports(own)
    found = {(row["containerPort"], row.get("name"), row.get("protocol", "TCP")) for row in merged.get("ports") or ()}
    if any((number, name, "TCP") not in found for number, name in wanted.items()):
        yield InputError(f"{place}.ports", f"{_named_ports(wanted)} are the operator's own and cannot change")


def _port_clashes(own: Document, given: Any, path: str) -> Iterator[InputError]:
    """Ports of the user's that take the number or the name of an own one: all containers share one address.

    Of the init containers those count that run beside the others, side cars.
    """
    wanted, is_init = _own_ports(own), path.endswith("initContainers")
    for index, container in enumerate(given or ()):
        if is_init and container.get("restartPolicy") != "Always":
            continue
        is_own = container.get("name") == own["name"]
        for place, row in enumerate(container.get("ports") or ()):
            number, name = row.get("containerPort"), row.get("name")
            takes_name = name in wanted.values() and wanted.get(number) != name
            takes_number = not is_own and number in wanted and row.get("protocol", "TCP") == "TCP"
            if takes_name or takes_number:
                message = f"clashes with the operator's own: {_named_ports(wanted)}"
                yield InputError(f"{path}[{index}].ports[{place}]", message)


def _own_ports(own: Document) -> dict[int, str]:
    return {row["containerPort"]: row["name"] for row in own.get("ports", ())}


def _named_ports(wanted: Mapping[int, str]) -> str:
    return ", ".join(f"{number} ({name})" for number, name in wanted.items())


def _mount_clashes(own: Document, theirs: Mapping[str, Any], merged: Document, path: str) -> Iterator[InputError]:
    mine = {row["mountPath"]: row for row in own["volumeMounts"]}
    found = {row["mountPath"]: row for row in merged.get("volumeMounts") or ()}
    for folder, row in mine.items():
        now = found.get(folder, {})
        if now and row["name"] in _REPLACEABLE_VOLUMES:
            continue
        if now.get("name") != row["name"] or now.keys() & {"subPath", "subPathExpr"}:
            yield InputError(path, f"{folder} is the operator's own, and needs its volume {row['name']!r}")
    for index, row in enumerate(theirs.get("volumeMounts") or ()):
        folder = row.get("mountPath")
        clash = None if folder is None or folder in mine else _clash_of(folder, own["volumeMounts"])
        if clash is not None:
            yield InputError(
                f"{path}[{index}]", f"{folder} is, holds or lies in {clash}, a folder of the operator's own"
            )


def _clash_of(folder: str, own: Sequence[Document]) -> str | None:
    normal = normal_path(folder)
    found = (row["mountPath"] for row in own if _overlap(normal, row["mountPath"], closed=_is_closed(row["name"])))
    return next(found, None)


def _env_clashes(
    own: Document, theirs: Mapping[str, Any], merged: Document, path: str, fields: Mapping[str, str]
) -> Iterator[InputError]:
    now = {row["name"]: row for row in merged.get("env") or ()}
    places = {row.get("name"): f"{path}[{index}]" for index, row in enumerate(theirs.get("env") or ())}
    referring = {row["name"] for row in own.get("env", ()) if "valueFrom" in row and now.get(row["name"]) != row}
    for name in sorted(referring | ((_RESERVED_ENV | fields.keys()) & places.keys())):
        owner = f"is set by {fields[name]}; take one of the two away" if name in fields else "is the operator's own"
        yield InputError(places.get(name, path), f"{name} {owner}")


def _gaps(spec: Document, given: Any, kind: str, path: str, own: str) -> Iterator[InputError]:
    """Containers without an image, as one with a mistyped name is, and mounts without a volume."""
    volumes = {row["name"] for row in spec.get("volumes") or ()}
    for container in spec.get(kind) or ():
        place, theirs = _find_entry(given, container["name"], path)
        if theirs and not container.get("image"):
            yield InputError(
                place, f"image is needed for {container['name']!r}; the operator's own container is {own!r}"
            )
        for index, mount in enumerate(theirs.get("volumeMounts") or ()):
            name = mount.get("name")
            if name is not None and name not in volumes:
                message = f"no volume {name!r}; known: {render_choices(volumes)}"
                yield InputError(f"{place}.volumeMounts[{index}].name", message)


def _name_clashes(spec: Document, path: str) -> Iterator[InputError]:
    names = {row["name"] for row in spec["containers"]} if spec.get("containers") else set()
    for row in spec.get("initContainers") or ():
        if row["name"] in names:
            yield InputError(path, f"{row['name']!r} is the name of another container of the pod")
