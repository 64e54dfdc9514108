"""The shapes that the advisor simulates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_tools.advisor.candidates import PresentShape, list_candidates, list_refinements
from moe_tools.advisor.clocks import ServerParallelism


def candidates(
    gpus=8,
    *,
    present=0,
    room=lambda group: 10**6,
    groups=lambda gpus: [ServerParallelism(gpus)],
    longest=16_384,
    step_tokens=2048,
):
    present = present if isinstance(present, PresentShape) else PresentShape(group=ServerParallelism(present))
    return list_candidates(
        gpus, step_tokens=step_tokens, present=present, groups=groups, kv_tokens=room, longest_tokens=longest
    )


def test_the_shapes_of_four_gpus():
    found, excluded = candidates(4, present=2)
    assert [(row.servers, row.roles) for row in found] == [
        ("1 of 4", "unified"),
        ("2 of 2", "unified"),
        ("2 of 2", "auto"),
        ("2 of 2", "{prefill: 1, decode: 1}"),
        ("4 of 1", "unified"),
        ("4 of 1", "auto"),
        ("4 of 1", "{prefill: 1, decode: 3}"),
        ("4 of 1", "{prefill: 2, decode: 2}"),
        ("4 of 1", "{prefill: 3, decode: 1}"),
    ]
    assert [row.servers for row in found if row.is_present] == ["2 of 2"]
    assert excluded == []


@pytest.mark.parametrize(
    ("present", "roles"),
    [
        (PresentShape(group=ServerParallelism(1), roles="auto"), "auto"),
        (
            PresentShape(group=ServerParallelism(1), roles="{prefill: 1, decode: 7}", prefill=1),
            "{prefill: 1, decode: 7}",
        ),
    ],
)
def test_the_shape_of_the_file_is_one_of_them_whatever_its_roles(present, roles):
    found, _ = candidates(8, present=present)
    assert [(row.servers, row.roles) for row in found if row.is_present] == [("8 of 1", roles)]


def test_one_gpu_has_one_shape():
    found, _ = candidates(1)
    assert [(row.servers, row.roles) for row in found] == [("1 of 1", "unified")]


def test_servers_whose_kv_cache_does_not_hold_a_request_are_named_with_the_reason():
    found, excluded = candidates(4, room=lambda group: 20_000 if group.ranks > 1 else -5)
    assert {row.servers for row in found} == {"1 of 4", "2 of 2"}
    assert [row.servers for row in excluded] == ["4 of 1"]
    assert "0 tokens of KV cache" in excluded[0].reason
    assert "16,384" in excluded[0].reason


def test_servers_without_step_times_are_named():
    found, excluded = candidates(4, groups=lambda gpus: [] if gpus == 2 else [ServerParallelism(gpus)])
    assert {row.servers for row in found} == {"1 of 4", "4 of 1"}
    assert [(row.servers, "not among the fitted" in row.reason) for row in excluded] == [("2 of 2", True)]


def test_servers_of_one_size_differ_in_their_parallelism():
    groups = {
        4: [ServerParallelism(4), ServerParallelism(1, 4, False)],
        2: [ServerParallelism(1, 2), ServerParallelism(2, 1, False)],
        1: [],
    }
    found, _ = candidates(4, groups=groups.get, present=PresentShape(group=ServerParallelism(1, 2), roles="auto"))
    assert list(dict.fromkeys(row.servers for row in found)) == [
        "1 of 4", "1 of tensor 4", "2 of tensor 2, experts spread", "2 of data 2",
    ]  # fmt: skip
    assert {row.shape.gpus for row in found} == {4}
    assert [(row.servers, row.roles) for row in found if row.is_present] == [("2 of tensor 2, experts spread", "auto")]


@given(gpus=st.integers(1, 64), step_tokens=st.sampled_from([512, 2048]))
def test_every_shape_uses_all_gpus_and_keeps_an_engine_of_each_role(gpus, step_tokens):
    found, _ = candidates(gpus, step_tokens=step_tokens)
    assert found
    for row in found:
        assert row.shape.gpus == gpus
        assert row.shape.limits == {"max_num_batched_tokens": step_tokens}
        assert row.shape.prefill is None or 0 < row.shape.prefill < len(row.shape.servers)
    assert len({(row.servers, row.roles) for row in found}) == len(found)


@pytest.mark.parametrize(("gpus", "copies"), [(4, [4]), (4, []), (1, [])])
def test_the_best_shape_is_tried_with_other_steps_and_with_copies_of_experts(gpus, copies):
    best = candidates(gpus, present=gpus)[0][0]
    found = list_refinements(best, sum(copies))
    assert [row.step_tokens for row in found if not row.shape.redundant] == [512, 8192]
    assert [row.shape.redundant for row in found if row.shape.redundant] == copies
    assert all(row.shape.servers == best.shape.servers for row in found)
    assert not any(row.is_present for row in found)
