"""Hypothesis strategies of pod templates made from the types of a pod: right, nearly right and wrong ones."""

from typing import Any

from hypothesis import strategies as st
from moe_operator.api.pod_schema import LIST, MAP, PodField, load_types

Document = dict[str, Any]
# Names, folders and ports of the operator's own come often, so that templates meddle with them.
WORDS = ["engine", "gateway", "config", "settings", "run", "shm", "tmp", "cache", "mine", "agent", "http", "HF_TOKEN"]
FOLDERS = ["/dev/shm", "/etc", "/etc/moeserving", "/etc/moeserving/x", "/run/moeserving/", "/cache", "/data", "/", ""]
JUNK = [None, True, -1, 0, 1.5, "", "x", [], {}, {"$patch": "delete"}, {"$patch": "replace"}, [None], [{}], "64GB"]
MAX_DEPTH = 6


def field_values(field: PodField, depth: int) -> st.SearchStrategy[Any]:
    """Values of a field, among them null and values of another type."""
    right = _right_values(field, depth)
    return st.one_of(right, right, right, st.sampled_from(JUNK))


def _right_values(field: PodField, depth: int) -> st.SearchStrategy[Any]:
    of = field.type
    if of.startswith(LIST):
        entry = _right_values(PodField(type=of.removeprefix(LIST)), depth + 1)
        return st.lists(entry, max_size=2)
    if of.startswith(MAP):
        return st.dictionaries(
            st.sampled_from(WORDS), _right_values(PodField(type=of.removeprefix(MAP)), depth), max_size=2
        )
    if of in load_types():
        return structures(of, depth + 1)
    return st.sampled_from(
        {
            "string": [*WORDS, *FOLDERS, "TCP", "UDP", "$(A)"],
            "boolean": [True, False],
            "int32": [0, 1, 8000, 8080, 2**31 - 1, -1],
            "int64": [0, 30, 2**62],
            "quantity": ["1", "64Gi", 2, 0.5, "1e3"],
            "intOrString": [8000, "agent", "25%"],
        }.get(of, [{}])
    )


@st.composite
def structures(draw: st.DrawFn, name: str, depth: int = 0) -> Document:
    """Documents of a structure; few fields, and fewer the deeper they lie."""
    fields = load_types()[name]
    if depth > MAX_DEPTH:
        return {}
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3 if depth < 3 else 2, unique=True))
    found = {field: draw(field_values(fields[field], depth)) for field in chosen}
    if "name" in fields and draw(st.booleans()):
        found["name"] = draw(st.sampled_from(WORDS))
    return found


@st.composite
def own_containers(draw: st.DrawFn, own: str) -> Document:
    """Changes of the operator's own container."""
    return draw(structures("Container", 1)) | {"name": own}


@st.composite
def pod_templates_of_all_kinds(draw: st.DrawFn, own: str) -> Document:
    """Templates that touch any field of a pod, and the operator's own container more often than others."""
    spec = draw(structures("PodSpec"))
    if draw(st.booleans()):
        spec["containers"] = [draw(own_containers(own)), *draw(st.lists(structures("Container", 2), max_size=1))]
    template: Document = {"spec": draw(st.sampled_from([spec, spec, spec, None, "x", {"$patch": "delete"}]))}
    if draw(st.booleans()):
        template["metadata"] = draw(
            st.sampled_from(
                [None, {}, {"labels": None}, {"labels": {"a": None}}, {"annotations": {"a": 1}}, {"name": "x"}]
            )
        )
    return template
