"""Which engines there are, as EndpointSlices have them: by name, once each, whatever the order and the oddities."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.engines.endpoints import Endpoint, read_endpoints

from tests.gateway.fake_api import make_slice

STABLE, CANARY = "tiny-engine", "tiny-engine-canary"
GROUPS = (STABLE, CANARY)


def read(*rows: dict[str, Any], groups: tuple[str, ...] = GROUPS, ranks: int = 1) -> tuple[Endpoint, ...]:
    return read_endpoints(rows, groups, ranks)


def offered(*rows: dict[str, Any]) -> dict[str, bool]:
    return {endpoint.address.name: endpoint.offered for endpoint in read(*rows)}


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    """The slice with this field of its endpoints left out."""
    endpoints = [{key: value for key, value in given.items() if key != field} for given in row["endpoints"]]
    return row | {"endpoints": endpoints}


def port(name: str | None, number: int | None, protocol: str | None = "TCP") -> dict[str, Any]:
    fields = {"name": name, "port": number, "protocol": protocol}
    return {key: value for key, value in fields.items() if value is not None}


def test_an_endpoint_is_an_engine_named_by_its_pod():
    (found,) = read(make_slice("s", STABLE, {"tiny-0": {"address": "10.0.0.1", "ready": True}}), ranks=4)
    assert (found.address.name, found.address.ranks, found.group) == ("tiny-0", 4, STABLE)
    assert (found.address.url, found.address.agent_url) == ("http://10.0.0.1:8000", "http://10.0.0.1:8080")


def test_several_slices_of_a_service_are_one_list_in_the_order_of_names():
    rows = [
        make_slice("s-2", STABLE, {"c": {"address": "10.0.0.3"}, "a": {"address": "10.0.0.1"}}),
        make_slice("s-1", STABLE, {"b": {"address": "10.0.0.2"}}),
        make_slice("s-3", CANARY, {"d": {"address": "10.0.0.4"}}),
        make_slice("s-4", "another-service", {"e": {"address": "10.0.0.5"}}),
    ]
    found = [(endpoint.address.name, endpoint.group) for endpoint in read(*rows)]
    assert found == [("a", STABLE), ("b", STABLE), ("c", STABLE), ("d", CANARY)]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, True),
        ({"ready": True, "serving": True, "terminating": False}, True),
        ({"ready": None}, True),
        ({"ready": False}, False),
        ({"ready": False, "serving": False, "terminating": False}, False),
        # As Kubernetes says it of a pod that was deleted and still serves.
        ({"ready": False, "serving": True, "terminating": True}, False),
        ({"ready": True, "serving": True, "terminating": True}, False),
        # As it says of a pod that is not ready behind a Service with `publishNotReadyAddresses`.
        ({"ready": True, "serving": False, "terminating": False}, False),
    ],
)
def test_an_endpoint_that_is_not_ready_or_is_about_to_end_is_known_and_not_offered(conditions, expected):
    assert offered(make_slice("s", STABLE, {"a": {"address": "10.0.0.1", **conditions}})) == {"a": expected}


def test_conditions_that_are_absent_altogether_count_as_ready():
    assert offered(without(make_slice("s", STABLE, {"a": {"address": "10.0.0.1"}}), "conditions")) == {"a": True}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"ready": False}, {"ready": True}, True),
        ({"ready": False}, {"ready": False}, False),
        ({"ready": True}, {"ready": False, "serving": True, "terminating": True}, False),
    ],
)
def test_an_endpoint_in_two_slices_is_one_engine(first, second, expected):
    """While a controller moves it from one to the other: the newest readiness counts, and so does its end."""
    rows = [
        make_slice(f"s-{at}", STABLE, {"a": {"address": "10.0.0.1", **row}}) for at, row in enumerate((first, second))
    ]
    assert offered(*rows) == offered(*reversed(rows)) == {"a": expected}


def test_of_two_families_ipv4_is_taken_and_ipv6_alone_is_an_address_too():
    four = make_slice("s-4", STABLE, {"a": {"address": "10.0.0.1"}})
    six = make_slice("s-6", STABLE, {"a": {"address": "fd00::1"}}, addressType="IPv6")
    for rows in ([four, six], [six, four]):
        assert [endpoint.address.url for endpoint in read(*rows)] == ["http://10.0.0.1:8000"]
    (alone,) = read(six)
    assert (alone.address.url, alone.address.agent_url) == ("http://[fd00::1]:8000", "http://[fd00::1]:8080")


def test_an_endpoint_of_two_services_belongs_to_the_first():
    rows = [make_slice(f"s-{group}", group, {"a": {"address": "10.0.0.1"}}) for group in reversed(GROUPS)]
    assert [endpoint.group for endpoint in read(*rows)] == [STABLE]
    assert [endpoint.group for endpoint in read(*rows, groups=(CANARY, STABLE))] == [CANARY]


def test_an_address_without_a_pod_is_named_by_itself():
    row = without(make_slice("s", STABLE, {"a": {"address": "10.0.0.1"}, "b": {"address": "10.0.0.2"}}), "targetRef")
    assert [endpoint.address.name for endpoint in read(row)] == ["10.0.0.1", "10.0.0.2"]


def test_an_address_that_two_names_claim_is_one_engine():
    rows = [
        make_slice("s-1", STABLE, {"a": {"address": "10.0.0.1"}}),
        without(make_slice("s-2", STABLE, {"a": {"address": "10.0.0.1"}}), "targetRef"),
    ]
    assert len(read(*rows)) == len(read(*reversed(rows))) == 1


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ([port("agent", 18080), port("metrics", 9), port("engine", 18000)], (18000, 18080)),
        ([port("engine", 8000)], (8000, None)),
        ([port("engine", 8000), port("agent", None)], (8000, None)),
        ([port("engine", 8000), port("agent", 8080, protocol="UDP")], (8000, None)),
        ([port("engine", 8000, protocol=None)], (8000, None)),
        ([port("engine", None), port("agent", 8080)], None),
        ([port("http", 8000), port(None, 8001)], None),
        ([], None),
        (None, None),
    ],
)
def test_ports_are_found_by_their_names(ports, expected):
    row = make_slice("s", STABLE, {"a": {"address": "10.0.0.1"}}, ports=ports)
    urls = [(endpoint.address.url, endpoint.address.agent_url) for endpoint in read(row)]
    if expected is None:
        assert urls == []
    else:
        engine, agent = (None if number is None else f"http://10.0.0.1:{number}" for number in expected)
        assert urls == [(engine, agent)]


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoints": None},
        {"endpoints": []},
        {"endpoints": [{"addresses": []}]},
        {"addressType": "FQDN"},
        {"metadata": {"name": "s"}},
    ],
)
def test_a_slice_without_a_usable_endpoint_has_no_engine(changes):
    assert read(make_slice("s", STABLE, {"a": {"address": "10.0.0.1"}}) | changes) == ()


PODS = st.dictionaries(
    st.sampled_from("abcd"),
    st.fixed_dictionaries(
        {"address": st.sampled_from([f"10.0.0.{last}" for last in range(1, 5)])},
        optional={name: st.none() | st.booleans() for name in ("ready", "serving", "terminating")},
    ),
    max_size=3,
)
SLICES = st.lists(st.tuples(st.sampled_from([*GROUPS, "another"]), PODS, st.booleans()), max_size=4).map(
    lambda rows: [
        make_slice(f"s-{at}", group, pods) if named else without(make_slice(f"s-{at}", group, pods), "targetRef")
        for at, (group, pods, named) in enumerate(rows)
    ]
)


@given(SLICES, st.randoms(use_true_random=False))
def test_the_order_of_slices_means_nothing_and_each_name_and_address_is_there_once(rows, random):
    found = read(*rows)
    assert found == read(*random.sample(rows, len(rows)))
    for values in ([row.address.name for row in found], [row.address.url for row in found]):
        assert len(set(values)) == len(values)
    assert {row.group for row in found} <= set(GROUPS)
