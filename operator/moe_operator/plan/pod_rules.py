"""What the API server asks of a pod beyond its types: needed fields, ranges, fields that exclude each other.

Checked where a user's template has touched a structure, on the pod as it is merged, so that a gap which the operator's
own part fills is none. Names of the structures, needed fields and closed sets are those of the Kubernetes API
(`moe_operator.api.pod_schema`); the other rules are those of k8s.io/kubernetes v1.34, pkg/apis/core/validation. What
is not here the API server finds before anything of a change is applied. Pure.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from ipaddress import ip_address
from typing import Any

from moe_contract.input_errors import InputError, render_choices, unknown_choice

from moe_operator.api.object_names import RESOURCE_MESSAGE, is_resource_name
from moe_operator.api.pod_schema import LIST, ROOT, PodField, load_types
from moe_operator.plan.pod_forms import find_broken_forms, find_broken_references

Document = Mapping[str, Any]
Mistake = tuple[str, str]
Rule = Callable[[Document], Iterator[Mistake]]

MOST_ID, MOST_MODE, MOST_PORT = 2**31 - 1, 0o777, 65535
_ANY = float("inf")
_MODE, _PORT, _COUNT, _ID, _WEIGHT = (0, MOST_MODE), (1, MOST_PORT), (0, _ANY), (0, MOST_ID), (1, 100)
_RANGES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "ConfigMapVolumeSource": {"defaultMode": _MODE},
    "ContainerPort": {"containerPort": _PORT, "hostPort": (0, MOST_PORT)},
    "DownwardAPIVolumeFile": {"mode": _MODE},
    "DownwardAPIVolumeSource": {"defaultMode": _MODE},
    "GRPCAction": {"port": _PORT},
    "HTTPGetAction": {"port": _PORT},
    "KeyToPath": {"mode": _MODE},
    "PodSecurityContext": dict.fromkeys(("fsGroup", "runAsGroup", "runAsUser"), _ID),
    "PreferredSchedulingTerm": {"weight": _WEIGHT},
    "Probe": {
        **dict.fromkeys(
            ("failureThreshold", "initialDelaySeconds", "periodSeconds", "successThreshold", "timeoutSeconds"), _COUNT
        ),
        "terminationGracePeriodSeconds": (1, _ANY),
    },
    "ProjectedVolumeSource": {"defaultMode": _MODE},
    "SecretVolumeSource": {"defaultMode": _MODE},
    "SecurityContext": dict.fromkeys(("runAsGroup", "runAsUser"), _ID),
    "ServiceAccountTokenProjection": {"expirationSeconds": (600, 2**32)},
    "SleepAction": {"seconds": _COUNT},
    "TCPSocketAction": {"port": _PORT},
    "TopologySpreadConstraint": {"maxSkew": (1, _ANY), "minDomains": (1, _ANY)},
    "WeightedPodAffinityTerm": {"weight": _WEIGHT},
}
# Closed sets that the API describes in words alone.
_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "ContainerResizePolicy": {
        "resourceName": ("cpu", "memory"),
        "restartPolicy": ("NotRequired", "RestartContainer"),
    },
    "LabelSelectorRequirement": {"operator": ("DoesNotExist", "Exists", "In", "NotIn")},
    "PodOS": {"name": ("linux", "windows")},
}
_HANDLERS = ("exec", "grpc", "httpGet", "tcpSocket")
# Exactly one of these fields.
_ONE_OF: Mapping[str, tuple[str, ...]] = {
    "EnvFromSource": ("configMapRef", "secretRef"),
    "EnvVarSource": ("configMapKeyRef", "fieldRef", "fileKeyRef", "resourceFieldRef", "secretKeyRef"),
    "LifecycleHandler": ("exec", "httpGet", "sleep", "tcpSocket"),
    "Probe": _HANDLERS,
}
# At most one of these fields; of a volume, whose sources are many, any but its name.
_NOT_BOTH: Mapping[str, tuple[str, ...]] = {
    "EnvVar": ("value", "valueFrom"),
    "Volume": tuple(name for name in load_types()["Volume"] if name != "name"),
    "VolumeMount": ("subPath", "subPathExpr"),
    "VolumeProjection": tuple(load_types()["VolumeProjection"]),
}
# Needed beside those that the API calls so.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "ConfigMapEnvSource": ("name",),
    "ConfigMapKeySelector": ("name",),
    "ConfigMapProjection": ("name",),
    "ConfigMapVolumeSource": ("name",),
    "EphemeralVolumeSource": ("volumeClaimTemplate",),
    "ExecAction": ("command",),
    "SecretEnvSource": ("name",),
    "SecretKeySelector": ("name",),
    "SecretProjection": ("name",),
    "SecretVolumeSource": ("secretName",),
}
_NATIVE = ("cpu", "memory", "ephemeral-storage")
_OWN_DOMAIN = "kubernetes.io/"
_LEADING_ZEROS = re.compile(r"(?<![0-9a-fA-F:])0+(?=[0-9])")
_EXPONENT = re.compile(r"(?P<number>[+-]?[0-9.]+)(?P<suffix>[a-zA-Z]*)")
_FACTORS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
# More than any amount of memory, and few enough digits to divide.
_MOST_BYTES = Decimal(10) ** 20
_BINARY = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def find_broken_rules(patch: Document, merged: Document, path: str) -> Iterator[InputError]:
    """What the API server would refuse of a pod's spec.

    Args:
        patch: the user's part, valid by its types.
        merged: the whole spec.
        path: of the user's part.
    """
    for place, message in _walk(patch, merged, ROOT):
        yield InputError(f"{path}{place}", message)


def _walk(given: Document, now: Document, type_name: str) -> Iterator[Mistake]:
    """Mistakes in a structure that the user touched, and in those below it that they touched."""
    fields = load_types()[type_name]
    if type_name != ROOT:
        # Of the pod itself only containers are needed, and without those of the operator it is refused already.
        yield from _missing(now, fields, type_name)
    yield from _out_of_range(now, type_name)
    yield from _out_of_set(now, type_name)
    yield from _exclusive(now, type_name)
    yield from find_broken_forms(now, type_name)
    yield from find_broken_references(now, type_name)
    for rule in _RULES.get(type_name, ()):
        yield from rule(now)
    for name, value in given.items():
        if name in fields:
            for place, part, whole, of in _below(value, now.get(name), fields[name]):
                yield from ((f".{name}{place}{rest}", message) for rest, message in _walk(part, whole, of))


def _below(value: Any, now: Any, field: PodField) -> Iterator[tuple[str, Document, Document, str]]:
    """The structures within a user's value, each with what it has become, and its type."""
    of = field.type.removeprefix(LIST)
    if of not in load_types():
        return
    if isinstance(value, Mapping) and isinstance(now, Mapping):
        yield "", value, now, of
    for index, entry in enumerate(value if isinstance(value, list | tuple) and isinstance(now, list) else ()):
        whole = _find(now, entry, index, field.merge_key)
        if isinstance(entry, Mapping) and whole is not None:
            yield f"[{index}]", entry, whole, of


def _find(now: Sequence[Any], entry: Any, index: int, key: str) -> Document | None:
    """What an entry of the user's list has become; None where it was removed."""
    if not key:
        return now[index] if index < len(now) and isinstance(now[index], Mapping) else None
    name = entry.get(key) if isinstance(entry, Mapping) else None
    return next((row for row in now if name is not None and row.get(key) == name), None)


def _missing(now: Document, fields: Mapping[str, PodField], type_name: str) -> Iterator[Mistake]:
    more = _NEEDED.get(type_name, ())
    for name, field in fields.items():
        if (field.is_required or name in more) and now.get(name) in (None, "", []):
            yield "", f"{name} is needed"


def _out_of_range(now: Document, type_name: str) -> Iterator[Mistake]:
    for name, (least, most) in _RANGES.get(type_name, {}).items():
        value = now.get(name)
        if isinstance(value, int) and not least <= value <= most:
            bound = f"from {least:.0f} to {most:.0f}" if most != _ANY else f"of {least:.0f} or more"
            yield f".{name}", f"a number {bound} is needed, got {value}"


def _out_of_set(now: Document, type_name: str) -> Iterator[Mistake]:
    for name, known in _SETS.get(type_name, {}).items():
        if now.get(name) and now[name] not in known:
            yield f".{name}", unknown_choice("", now[name], known).message


def _exclusive(now: Document, type_name: str) -> Iterator[Mistake]:
    names = _ONE_OF.get(type_name) or _NOT_BOTH.get(type_name, ())
    there = sorted(name for name in names if now.get(name) not in (None, ""))
    if type_name in _ONE_OF and len(there) != 1:
        has = " and ".join(there) or "none"
        advice = "with `$patch: replace` beside yours the operator's goes" if there else "`$patch: delete` removes it"
        advice = f"; {advice}" if type_name in ("LifecycleHandler", "Probe") else ""
        yield "", f"one of {render_choices(names)} is needed, got {has}{advice}"
    elif type_name in _NOT_BOTH and len(there) > 1:
        yield "", f"{' and '.join(there)} exclude each other"


def _toleration(now: Document) -> Iterator[Mistake]:
    operator = now.get("operator") or "Equal"
    if not now.get("key") and operator != "Exists":
        yield ".operator", "without a key Exists is needed"
    if operator == "Exists" and now.get("value"):
        yield ".value", "goes with the operator Equal alone"
    if now.get("tolerationSeconds") is not None and now.get("effect") not in ("NoExecute", "", None):
        yield ".tolerationSeconds", "goes with the effect NoExecute alone"
    if now.get("tolerationSeconds") is not None and not now.get("effect"):
        yield ".effect", "NoExecute is needed beside tolerationSeconds"


def _requirement(now: Document) -> Iterator[Mistake]:
    """One of a node or label selector."""
    operator, values = now.get("operator"), now.get("values") or ()
    if operator in ("In", "NotIn") and not values:
        yield ".values", f"a value is needed for {operator}"
    if operator in ("Exists", "DoesNotExist") and values:
        yield ".values", f"{operator} has none"
    if operator in ("Gt", "Lt") and len(values) != 1:
        yield ".values", f"exactly one value is needed for {operator}"


def _node_term(now: Document) -> Iterator[Mistake]:
    """Fields of a node, of which only the name can be asked for."""
    for index, row in enumerate(now.get("matchFields") or ()):
        place = f".matchFields[{index}]"
        if row.get("key") not in ("metadata.name", None):
            yield f"{place}.key", unknown_choice("", row["key"], ("metadata.name",)).message
        if row.get("operator") not in ("In", "NotIn", None):
            yield f"{place}.operator", unknown_choice("", row["operator"], ("In", "NotIn")).message
        elif len(row.get("values") or ()) != 1:
            yield f"{place}.values", "exactly one value is needed for a field"


def _profile(now: Document) -> Iterator[Mistake]:
    """The rules of a profile of seccomp or AppArmor."""
    is_local, given = now.get("type") == "Localhost", now.get("localhostProfile")
    if is_local and given is None:
        yield "", "localhostProfile is needed for the type Localhost"
    if given and not is_local:
        yield ".localhostProfile", "goes with the type Localhost alone"


def _privileges(now: Document) -> Iterator[Mistake]:
    if now.get("allowPrivilegeEscalation") is not False:
        return
    advice = "set allowPrivilegeEscalation to true beside it, for the operator's own is false"
    if now.get("privileged"):
        yield ".privileged", advice
    if {"CAP_SYS_ADMIN"} & {*((now.get("capabilities") or {}).get("add") or ())}:
        yield ".capabilities.add", advice


def _amounts(now: Document) -> Iterator[Mistake]:
    """Requests beside limits; what is not shared, such as GPUs, has both alike. Kubernetes' own names are shared."""
    requests, limits = (now.get(part) or {} for part in ("requests", "limits"))
    for part, rows in (("requests", requests), ("limits", limits)):
        for name, value in rows.items():
            amount = _amount(value)
            if amount is not None and amount < 0:
                yield f".{part}.{name}", f"an amount of 0 or more is needed, got {value}"
            elif problem := _resource_problem(name):
                yield f".{part}.{name}", problem
            elif not _is_shared(name) and "/" in name and amount is not None and amount != amount.to_integral_value():
                yield f".{part}.{name}", f"a whole number is needed, got {value}"
    yield from _huge_pages({**requests, **limits})
    for name, value in requests.items():
        request, limit = _amount(value), _amount(limits.get(name))
        is_shared = _is_shared(name)
        if not is_shared and name not in limits:
            yield f".requests.{name}", "a limit of the same amount is needed"
        elif request is not None and limit is not None and (request > limit or (not is_shared and request != limit)):
            relation = "at most" if is_shared else "as much as"
            yield f".requests.{name}", f"{value} is not {relation} its limit, {limits[name]}"


def _huge_pages(amounts: Document) -> Iterator[Mistake]:
    """Pages of memory that are asked for in whole, beside a CPU or memory of the usual pages."""
    pages = {name: value for name, value in amounts.items() if name.startswith("hugepages-")}
    if pages and not {"cpu", "memory"} & amounts.keys():
        yield "", f"{min(pages)} needs cpu or memory beside it"
    for name, value in pages.items():
        size, amount = _amount(name.removeprefix("hugepages-")), _amount(value)
        if size and amount is not None and amount < _MOST_BYTES and amount % size:
            yield f".limits.{name}", f"a multiple of {name.removeprefix('hugepages-')} is needed, got {value}"


def _resource_problem(name: str) -> str:
    """Why there is no resource of this name; empty where there may be."""
    if name in _NATIVE or name.startswith("hugepages-"):
        return ""
    if "/" not in name:
        return f"unknown resource; known: {', '.join(_NATIVE)}, and those of a domain"
    # A quota puts the prefix before the name, and the whole has to be a key.
    if not is_resource_name(name):
        return f"{RESOURCE_MESSAGE}, got {name!r:.80}"
    return ""


def _is_shared(name: str) -> bool:
    return name in _NATIVE or ("/" in name and _OWN_DOMAIN in name)


def _amount(value: Any) -> Decimal | None:
    """The number that a quantity means; None where there is none."""
    match = _EXPONENT.fullmatch(str(value)) if value is not None and not isinstance(value, bool) else None
    try:
        if match is None:
            return None if value is None else Decimal(str(value))
        number, suffix = Decimal(match["number"]), match["suffix"]
    except InvalidOperation:
        return None
    if suffix in _BINARY:
        return number * Decimal(1024) ** (_BINARY.index(suffix) + 1)
    return number.scaleb(_FACTORS[suffix]) if suffix in _FACTORS else None


def _address(now: Document) -> Iterator[Mistake]:
    """Of a host's alias, and of DNS servers; there numbers of IPv4 may have leading zeros."""
    for place, text in ((".ip", now.get("ip")), *((".nameservers", row) for row in now.get("nameservers") or ())):
        try:
            ip_address(_LEADING_ZEROS.sub("", text or "0.0.0.0"))
        except ValueError:
            yield place, f"an IP address is needed, got {text!r:.80}"


def _dns(now: Document) -> Iterator[Mistake]:
    """How much a resolver takes, and options that have a name."""
    for name, most in (("nameservers", 3), ("searches", 32)):
        if len(now.get(name) or ()) > most:
            yield f".{name}", f"at most {most} are taken, got {len(now[name])}"
    for index, row in enumerate(now.get("options") or ()):
        if isinstance(row, Mapping) and not row.get("name"):
            yield f".options[{index}]", "name is needed"


def _spread(now: Document) -> Iterator[Mistake]:
    if now.get("minDomains") is not None and now.get("whenUnsatisfiable") not in ("DoNotSchedule", None):
        yield ".minDomains", "goes with DoNotSchedule alone"
    if now.get("matchLabelKeys") and not now.get("labelSelector"):
        yield ".matchLabelKeys", "goes with a labelSelector alone"


def _claim(now: Document) -> Iterator[Mistake]:
    """That of a volume of the pod's own, which the API server makes for it."""
    spec = now.get("spec") or {}
    modes = ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod")
    if not spec.get("accessModes"):
        yield ".spec", "accessModes is needed"
    for mode in spec.get("accessModes") or ():
        if mode not in modes:
            yield ".spec.accessModes", unknown_choice("", mode, modes).message
    if "storage" not in ((spec.get("resources") or {}).get("requests") or {}):
        yield ".spec.resources.requests", "storage is needed"


def _empty_dir(now: Document) -> Iterator[Mistake]:
    amount, medium = _amount(now.get("sizeLimit")), now.get("medium")
    if amount is not None and amount < 0:
        yield ".sizeLimit", f"an amount of 0 or more is needed, got {now['sizeLimit']}"
    if medium and medium not in ("Memory", "HugePages") and not medium.startswith("HugePages-"):
        # The API server takes any; a kubelet then starts no container.
        yield ".medium", unknown_choice("", medium, ("HugePages", "HugePages-2Mi", "Memory")).message


def _mount(now: Document) -> Iterator[Mistake]:
    if (now.get("recursiveReadOnly") or "Disabled") != "Disabled" and not now.get("readOnly"):
        yield ".recursiveReadOnly", "goes with readOnly alone"


def _divisor(now: Document) -> Iterator[Mistake]:
    """The unit of an amount that a variable or a file shows."""
    divisor, is_cpu = _amount(now.get("divisor")), str(now.get("resource")).endswith(".cpu")
    known = ("1", "1m") if is_cpu else ("1", *(f"1{unit}" for unit in (*"kMGTPE", *_BINARY)))
    if divisor and divisor not in map(_amount, known):
        yield ".divisor", unknown_choice("", now["divisor"], known).message


def _container(now: Document) -> Iterator[Mistake]:
    """Names of ports, and what needs a privileged container."""
    names = [row["name"] for row in now.get("ports") or () if row.get("name")]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ".ports", f"the name {name!r} stands twice"
    is_privileged = (now.get("securityContext") or {}).get("privileged")
    for row in now.get("volumeMounts") or ():
        if row.get("mountPropagation") == "Bidirectional" and not is_privileged:
            yield ".volumeMounts", f"Bidirectional at {row.get('mountPath')} needs a privileged container"


def _security(now: Document) -> Iterator[Mistake]:
    """Groups and kernel parameters of the pod as a whole."""
    least, most = _ID
    for index, group in enumerate(now.get("supplementalGroups") or ()):
        if isinstance(group, int) and not least <= group <= most:
            yield f".supplementalGroups[{index}]", f"a number from 0 to {MOST_ID} is needed, got {group}"
    names = [row.get("name") for row in now.get("sysctls") or ()]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield ".sysctls", f"{name!r} stands twice"


def _host(now: Document) -> Iterator[Mistake]:
    """What does not go with namespaces of the host, or with users of the pod's own."""
    shared = [name for name in ("hostIPC", "hostNetwork", "hostPID") if now.get(name)]
    if now.get("hostUsers") is False and shared:
        yield ".hostUsers", f"false does not go with {' and '.join(shared)}"
    if now.get("shareProcessNamespace") and now.get("hostPID"):
        yield ".shareProcessNamespace", "does not go with hostPID"
    for row in (now.get("securityContext") or {}).get("sysctls") or ():
        name = str(row.get("name")).replace("/", ".")
        if now.get("hostNetwork") and name.startswith("net."):
            yield ".securityContext.sysctls", f"{name} is the node's own with hostNetwork"
        if now.get("hostIPC") and name.startswith(("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")):
            yield ".securityContext.sysctls", f"{name} is the node's own with hostIPC"
    for row in (*(now.get("initContainers") or ()), *(now.get("containers") or ())):
        unmasked = (row.get("securityContext") or {}).get("procMount") == "Unmasked"
        if unmasked and now.get("hostUsers") is not False:
            yield ".containers", f"procMount Unmasked of {row.get('name')} needs hostUsers: false"


def _probes(now: Document) -> Iterator[Mistake]:
    """What one kind of probe alone may have."""
    for kind in ("livenessProbe", "startupProbe"):
        if ((now.get(kind) or {}).get("successThreshold") or 1) != 1:
            yield f".{kind}.successThreshold", "only 1 goes with this probe"
    if (now.get("readinessProbe") or {}).get("terminationGracePeriodSeconds") is not None:
        yield ".readinessProbe.terminationGracePeriodSeconds", "ends no container, so it has no such time"


def _pod(now: Document) -> Iterator[Mistake]:
    """What the template of a workload's pods may not have, and what needs the pod as a whole."""
    if now.get("restartPolicy") not in (None, "", "Always"):
        yield ".restartPolicy", "the pods of a workload have Always"
    if now.get("dnsPolicy") == "None" and not (now.get("dnsConfig") or {}).get("nameservers"):
        yield ".dnsConfig", "nameservers are needed for the dnsPolicy None"
    yield from _host(now)
    for name in ("activeDeadlineSeconds", "ephemeralContainers"):
        if now.get(name) not in (None, []):
            yield f".{name}", "the pods of a workload have none"
    grace_s = now.get("terminationGracePeriodSeconds", 30)
    lasting = [row for row in now.get("initContainers") or () if row.get("restartPolicy") == "Always"]
    for row in (*(now.get("containers") or ()), *lasting):
        handler = (row.get("lifecycle") or {}).get("preStop") or {}
        pause_s = (handler.get("sleep") or {}).get("seconds")
        if isinstance(grace_s, int) and pause_s is not None and pause_s > grace_s:
            message = f"{grace_s} is shorter than the pause of {pause_s} s before the end of {row.get('name')}"
            yield ".terminationGracePeriodSeconds", message
    for row in (row for row in now.get("initContainers") or () if row.get("restartPolicy") != "Always"):
        if part := next((name for name in (*_PROBES, "lifecycle") if row.get(name) is not None), None):
            yield ".initContainers", f"{part} of {row.get('name')} needs the restartPolicy Always"
    yield from _repeated_host_ports(now.get("containers") or ())
    if now.get("hostNetwork"):
        yield from _host_ports(now.get("containers") or ())


def _repeated_host_ports(containers: Iterable[Document]) -> Iterator[Mistake]:
    taken: set[tuple[str, str, int]] = set()
    for row in containers:
        for port in row.get("ports") or ():
            place = (port.get("protocol") or "TCP", port.get("hostIP") or "", port.get("hostPort") or 0)
            if place[2] and place in taken:
                yield ".containers", f"hostPort {place[2]} of {row.get('name')} is taken by another port of the pod"
            taken.add(place)


def _host_ports(containers: Iterable[Document]) -> Iterator[Mistake]:
    for row in containers:
        for port in row.get("ports") or ():
            if port.get("hostPort") not in (None, 0, port.get("containerPort")):
                message = f"on the host's network that of {row.get('name')} is {port['containerPort']}"
                yield ".containers", f"hostPort {port['hostPort']}: {message}"


_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_RULES: Mapping[str, Sequence[Rule]] = {
    "AppArmorProfile": (_profile,),
    "Container": (_container, _probes),
    "EmptyDirVolumeSource": (_empty_dir,),
    "HostAlias": (_address,),
    "LabelSelectorRequirement": (_requirement,),
    "NodeSelectorRequirement": (_requirement,),
    "NodeSelectorTerm": (_node_term,),
    "PersistentVolumeClaimTemplate": (_claim,),
    "PodDNSConfig": (_address, _dns),
    "PodSecurityContext": (_security,),
    "ResourceFieldSelector": (_divisor,),
    "PodSpec": (_pod,),
    "ResourceRequirements": (_amounts,),
    "SeccompProfile": (_profile,),
    "SecurityContext": (_privileges,),
    "Toleration": (_toleration,),
    "TopologySpreadConstraint": (_spread,),
    "VolumeMount": (_mount,),
}
