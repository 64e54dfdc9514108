"""What the operator remembers: the newest version of each object, by resource, and what a list says is gone."""

import tracemalloc
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from moe_contract.api_server import Kind, Listing
from moe_operator.kubernetes.kinds import CONFIG_MAP, DEPLOYMENT, POD, SERVING
from moe_operator.kubernetes.store import Key, Store, pack
from moe_operator.plan.names import INSTANCE

Document = dict[str, Any]
KEY = Key("ns", "tiny")


def document(name: str = "a", version: int = 1, uid: str = "u", of: str | None = "tiny") -> Document:
    labels = {} if of is None else {INSTANCE: of}
    return {
        "metadata": {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version), "labels": labels}
    }


def test_an_older_version_is_no_news_and_changes_nothing() -> None:
    store = Store()
    assert store.put(POD, document(version=9)) == KEY
    assert store.put(POD, document(version=9)) is None
    assert store.put(POD, document(version=8)) is None
    # As numbers: as texts 10 would be less than 9.
    assert store.put(POD, document(version=10)) == KEY
    assert store.of(KEY, POD) == [document(version=10)]


def test_another_object_of_the_name_is_news_whatever_its_version() -> None:
    store = Store()
    store.put(POD, document(version=9))
    assert store.put(POD, document(version=3, uid="another")) == KEY
    assert store.remove(POD, document(version=9)) == KEY, "the event of its end came late"
    assert store.of(KEY, POD) == [document(version=3, uid="another")]


def test_an_object_belongs_to_the_resource_that_its_label_names_and_a_resource_to_itself() -> None:
    store = Store()
    assert store.put(SERVING, document("tiny", of=None)) == KEY
    assert store.put(CONFIG_MAP, document("tiny-settings")) == KEY
    assert store.put(CONFIG_MAP, document("other", of=None)) is None
    assert store.serving(KEY) == document("tiny", of=None)
    assert [*store.children(KEY, [CONFIG_MAP])] == [(CONFIG_MAP, document("tiny-settings"))]
    assert store.known() == [KEY]


def test_an_object_whose_label_no_longer_names_its_resource_is_news_to_that_and_forgotten() -> None:
    store = Store()
    store.put(CONFIG_MAP, document("tiny-settings"))
    assert store.put(CONFIG_MAP, document("tiny-settings", of=None, uid="another")) is None
    assert store.put(CONFIG_MAP, document("tiny-settings", of=None, version=2)) == KEY
    assert store.get(KEY, CONFIG_MAP, "tiny-settings") is None
    assert store.known() == []


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    store = Store()
    store.put(POD, document())
    store.remove(POD, document())
    assert store.known() == []
    assert store.remove(POD, document()) == KEY
    assert store.known() == [], "the end of what was never known is kept nowhere"


def test_a_packed_list_is_as_good_as_a_whole_one() -> None:
    whole = document("stays", version=2) | {"spec": {"nodeName": "n"}}
    packed = pack(POD, whole)
    assert "spec" not in packed
    store = Store()
    store.put(POD, document("goes", version=1))
    assert store.replace(POD, Listing(items=[packed], version="7"), None) == {KEY}
    assert store.of(KEY, POD) == [whole]
    assert store.replace(POD, Listing(items=[packed], version="9"), None) == set(), "no news"


def test_a_list_says_what_is_gone_but_not_of_what_came_after_it_was_asked_for() -> None:
    store = Store()
    store.put(POD, document("gone", version=1))
    store.put(POD, document("stays", version=2))
    store.put(POD, document("new", version=8))
    assert store.replace(POD, Listing(items=[document("stays", version=2)], version="7"), "elsewhere") == set()
    assert store.replace(POD, Listing(items=[document("stays", version=2)], version="7"), "ns") == {KEY}
    assert {row["metadata"]["name"] for row in store.of(KEY, POD)} == {"stays", "new"}
    assert sorted(store.marks(POD)) == [(KEY, ("u", 2)), (KEY, ("u", 8))]
    both = [document("stays", version=2), document("new", version=8)]
    assert store.replace(POD, Listing(items=both, version="9"), None) == set(), "no news"
    assert store.replace(POD, Listing(items=[], version="9"), None) == {KEY}


kinds = st.sampled_from([POD, CONFIG_MAP])
objects = st.builds(
    document, st.sampled_from("ab"), st.integers(1, 4), st.sampled_from(["u", "v"]), st.sampled_from(["tiny", "big"])
)


@given(st.lists(st.tuples(st.booleans(), kinds, objects)))
def test_a_version_never_goes_back_and_the_index_is_what_was_put(steps: list[tuple[bool, Kind, Document]]) -> None:
    store, versions = Store(), {}
    for is_put, kind, entry in steps:
        metadata = entry["metadata"]
        place = (kind, metadata["labels"][INSTANCE], metadata["name"], metadata["uid"])
        if is_put:
            store.put(kind, entry)
            versions[place] = max(versions.get(place, 0), int(metadata["resourceVersion"]))
        else:
            store.remove(kind, entry)
            versions.pop(place, None)
        for kept in (POD, CONFIG_MAP):
            for live in (live for key in store.known() for live in store.of(key, kept)):
                meta = live["metadata"]
                assert (
                    int(meta["resourceVersion"]) <= versions[kept, meta["labels"][INSTANCE], meta["name"], meta["uid"]]
                )
                assert store.get(Key("ns", meta["labels"][INSTANCE]), kept, meta["name"]) == live
        assert all(store.children(key, [POD, CONFIG_MAP]) for key in store.known())


def test_managed_fields_are_kept_only_of_replicas() -> None:
    store = Store()
    spec = {"f:replicas": {}, "f:template": {"f:spec": {}}}
    fields = [
        {"manager": "moeserving", "operation": "Apply", "fieldsV1": {"f:spec": {"f:template": {}}}},
        {"manager": "kube-controller-manager", "operation": "Update", "fieldsV1": {"f:status": {"f:replicas": {}}}},
        {"manager": "autoscaler", "operation": "Update", "fieldsV1": {"f:spec": spec}, "subresource": "scale"},
    ]
    for kind in (POD, SERVING, DEPLOYMENT):
        made = document()
        made["metadata"]["managedFields"] = fields
        store.put(kind, made)
    for live in (store.of(KEY, POD)[0], store.serving(Key("ns", "a"))):
        assert live is not None
        assert "managedFields" not in live["metadata"]
    [deployment] = store.of(KEY, DEPLOYMENT)
    replicas = {"f:spec": {"f:replicas": {}}}
    assert deployment["metadata"]["managedFields"] == [{"manager": "autoscaler", "fieldsV1": replicas}]


def test_an_object_takes_little_more_memory_than_its_text() -> None:
    store, text = Store(), "x" * 1500
    tracemalloc.start()
    try:
        for number in range(300):
            store.put(CONFIG_MAP, document(f"c{number}") | {"data": {"text": text}})
        taken = tracemalloc.get_traced_memory()[0] / 300
    finally:
        tracemalloc.stop()
    assert taken < 2 * len(text)


def test_a_document_that_is_read_is_the_readers_own() -> None:
    store = Store()
    store.put(POD, document())
    store.of(KEY, POD)[0]["metadata"]["labels"].clear()
    assert store.of(KEY, POD) == [document()]
    assert store.count(POD) == 1
