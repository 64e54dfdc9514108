"""A request's tenant on its way through its id."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.tenancy import hash_tenant, priority_of, sign_request_id, tenant_of
from moe_scheduling.request.fairness import ANONYMOUS_TENANT

ids = st.from_regex(rb"[\x21-\x7e]{1,128}", fullmatch=True)
names = st.binary(min_size=1, max_size=200)
# What vLLM 0.32 makes of a header's id.
WAYS = [
    "chatcmpl-{}-9f8e7d6c",
    "cmpl-{}-0-9f8e7d6c",
    "1_cmpl-{}-0-9f8e7d6c",
    "embd-{}-prompt-0-chunk-1-9f8e7d6c",
    "{}",
]


@pytest.mark.parametrize("way", WAYS)
@given(request_id=ids, name=names)
def test_the_engine_finds_the_tenant_that_the_gateway_named(way, request_id, name):
    tenant = hash_tenant(name)
    assert tenant_of(way.format(sign_request_id(request_id, tenant).decode())) == tenant != ANONYMOUS_TENANT


@pytest.mark.parametrize("way", WAYS)
@given(request_id=ids | st.sampled_from([b"a.t1a2b3c4d", b".t1a2b3c4d", b"a.t1a2b3c4d-0", b".t.t1a2b3c4d"]))
def test_a_client_cannot_name_a_tenant_in_its_id(way, request_id):
    assert tenant_of(way.format(sign_request_id(request_id, ANONYMOUS_TENANT).decode())) == ANONYMOUS_TENANT


@given(request_id=st.text(max_size=40) | st.sampled_from(["a.t1a2b3c4d", "cmpl-a.t1a2b3c4d-0", "a.t1a2b3c4d-9f8e7d6c"]))
def test_nor_in_the_body_of_a_request_to_responses(request_id):
    """Where vLLM asks the body for the id, and no header."""
    assert tenant_of(f"{request_id}_0-9f8e7d6c") == ANONYMOUS_TENANT


@given(names)
def test_a_suffix_is_short_and_says_nothing_of_the_name(name):
    suffix = sign_request_id(b"id", hash_tenant(name))[2:]
    assert len(suffix) == 10
    assert set(suffix[2:]) <= set(b"0123456789abcdef")


def test_no_name_is_the_anonymous_tenant_and_leaves_the_id_as_it_is():
    assert hash_tenant(b"") == ANONYMOUS_TENANT
    assert sign_request_id(b"id", ANONYMOUS_TENANT) == b"id"


@pytest.mark.parametrize("text", ["", "id", "id.t", "id.t123", "id.tABCDEF01", "id.txyzw1234", "id.t00000000"])
def test_what_is_no_suffix_names_nobody(text):
    assert tenant_of(text) == ANONYMOUS_TENANT


@given(st.text())
def test_any_text_has_a_tenant_or_none(text):
    assert len(tenant_of(text)) in {0, 8}


priorities = st.integers(-1_000_000, 2**53 + 1_000_000)


@pytest.mark.parametrize("way", WAYS)
@given(request_id=ids | st.just(b"a.t1a2b3c4dp-5"), name=st.binary(max_size=20), priority=priorities)
def test_the_engine_finds_the_priority_that_the_gateway_named(way, request_id, name, priority):
    tenant = hash_tenant(name)
    signed = way.format(sign_request_id(request_id, tenant, priority).decode())
    assert priority_of(signed) == priority
    assert tenant_of(signed) == tenant


@pytest.mark.parametrize("way", WAYS)
@given(request_id=ids | st.sampled_from([b"a.t1a2b3c4dp-5", b"a.t00000000p-5", b".tp-5", b"a.t1a2b3c4dp-5-0"]))
def test_a_client_cannot_name_a_priority_in_its_id(way, request_id):
    for tenant in (ANONYMOUS_TENANT, hash_tenant(b"team")):
        assert priority_of(way.format(sign_request_id(request_id, tenant).decode())) is None


@given(st.text() | st.from_regex(r".*\.t[0-9a-f]{8}p?-?[0-9_\-]*", fullmatch=True))
def test_any_text_has_a_priority_or_none(text):
    assert priority_of(text) is None or priority_of(text + "_0") is None


@pytest.mark.parametrize("text", ["", "id", "id.t1a2b3c4d", "id.t1a2b3c4dp", "id.t1a2b3c4dp5x", "id.tp5", "id.t1a2p5"])
def test_what_is_no_priority_is_none(text):
    assert priority_of(text) is None
