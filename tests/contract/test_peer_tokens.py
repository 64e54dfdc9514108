"""The header by which an engine knows its gateways: derived, rotated, and never the control token itself."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from moe_contract.peer_tokens import PeerTokens, derive_peer_token


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole, as the kubelet's link does."""
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


def make(path: Path) -> tuple[PeerTokens, list[float]]:
    now = [0.0]
    return PeerTokens(path, lambda: now[0]), now


def shown(tokens: PeerTokens) -> bytes:
    name, _, value = tokens.head_end.removesuffix(b"\r\n\r\n").partition(b": ")
    assert name == b"x-moeserving-peer"
    return value


def test_a_gateway_and_an_engine_of_one_file_know_each_other_and_no_others(tmp_path):
    (one := tmp_path / "one").write_text("secret\n")
    (two := tmp_path / "two").write_text("another\n")
    gateway, engine = make(one)[0], make(one)[0]
    assert engine.allow(shown(gateway))
    assert not engine.allow(shown(make(two)[0]))
    assert b"secret" not in gateway.head_end
    for wrong in (b"", b",", b"secret", derive_peer_token(b"secret")[:-1]):
        assert not engine.allow(wrong)


def test_while_a_rotation_is_under_way_both_orders_of_arrival_pass(tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    early.write_text("old\n")
    late.write_text("old\n")
    gateway, engine = make(early), make(late)
    for content in ("new\nold\n", "new\n"):
        write(early, content)
        for tokens, now in (gateway, engine):
            now[0] += 1.0
            tokens.refresh()
        assert engine[0].allow(shown(gateway[0]))
        assert gateway[0].allow(shown(engine[0]))
        write(late, content)
        engine[1][0] += 1.0
        assert engine[0].allow(shown(gateway[0]))
    assert not engine[0].allow(derive_peer_token(b"old"))


def test_the_file_is_looked_at_once_a_second_and_its_loss_changes_nothing(tmp_path):
    (path := tmp_path / "token").write_text("a\n")
    tokens, now = make(path)
    write(path, "b\n")
    now[0] = 0.9
    assert not tokens.allow(derive_peer_token(b"b"))
    now[0] = 1.0
    assert tokens.allow(derive_peer_token(b"b"))
    path.unlink()
    now[0] = 3.0
    assert tokens.allow(derive_peer_token(b"b"))


def test_without_a_file_nothing_is_shown_and_nobody_passes(tmp_path):
    tokens, _ = make(tmp_path / "absent")
    assert tokens.head_end == b"\r\n"
    assert not tokens.allow(b"")


@given(st.sets(st.binary(min_size=1, max_size=20), min_size=2))
def test_other_tokens_have_other_values(tokens):
    values = {derive_peer_token(token) for token in tokens}
    assert len(values) == len(tokens)
    assert all(len(value) == 64 for value in values)


def test_a_signed_value_is_good_for_its_request_alone_and_for_a_minute(tmp_path):
    (path := tmp_path / "token").write_text("secret\n")
    wall = [1000.9]
    tokens = PeerTokens(path, wall=lambda: wall[0])
    value = tokens.sign(b"POST", b"/v1/completions")
    assert value.startswith(b"v1.1060.")
    assert tokens.allow_request(value, b"POST", b"/v1/completions")
    assert not tokens.allow(value)
    assert not tokens.allow_request(value, b"GET", b"/v1/completions")
    assert not tokens.allow_request(value, b"POST", b"/v1/embeddings")
    longer = value.replace(b"1060", b"9999")
    for wrong in (longer, value[:-1], b"v1.1060.", b"v1.x.y", b"v1." + b"9" * 5000 + b".", b"v1", b"v1..", b"\xff"):
        assert not tokens.allow_request(wrong, b"POST", b"/v1/completions")
    wall[0] = 1060.9
    assert not tokens.allow_request(value, b"POST", b"/v1/completions")


def test_what_is_shown_with_each_request_does_not_sign(tmp_path):
    (path := tmp_path / "token").write_text("secret\n")
    (shown_as_token := tmp_path / "shown").write_bytes(derive_peer_token(b"secret"))
    engine, thief = PeerTokens(path), PeerTokens(shown_as_token)
    assert not engine.allow_request(thief.sign(b"POST", b"/"), b"POST", b"/")


def test_a_rotation_does_not_end_signed_values(tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    early.write_text("new\nold\n")
    late.write_text("old\n")
    value = PeerTokens(early).sign(b"POST", b"/")
    assert PeerTokens(late).allow_request(value, b"POST", b"/")
    assert PeerTokens(tmp_path / "absent").sign(b"POST", b"/") == b""
