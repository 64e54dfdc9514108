"""The README's figures: those of the summary, and no others."""

import json

import pytest
from moe_lab.experiments.readme import (
    BEGIN,
    END,
    README,
    ROOT,
    SUMMARY,
    find_unsupported,
    main,
    render_block,
    replace_block,
)

RATIO = {"value": 0.7012, "low": 0.6, "high": 0.8, "pairs": 8}
COLUMNS = ("ttft_mean", "ttft_p99", "ttft_p99_longest", "tpot_mean", "output_tokens_per_s")


def summary(value=0.7012, high=0.8):
    ratios = {name: {**RATIO, "value": value, "high": high} for name in COLUMNS}
    figures = {
        "workloads": ["azure", "twoEnd"],
        "against_vllm": ratios,
        "against_best": ratios,
        "against_best_in_ttft": ratios,
    }
    return {
        "clock": "step times of a clock",
        "runs": 12,
        "seeds": 2,
        "at_knee": {},
        "by_load": {"a fleet, two: 1": figures},
    }


@pytest.fixture
def root(tmp_path):
    (tmp_path / SUMMARY).parent.mkdir(parents=True)
    (tmp_path / SUMMARY).write_text(json.dumps(summary()))
    (tmp_path / SUMMARY).with_name("README.md").write_text("0.70 [0.60, 0.80]")
    (tmp_path / README).write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return tmp_path


def test_what_is_written_is_what_is_checked(root, capsys):
    assert main(["--check", "--root", str(root)]) == 1
    assert "make generate" in capsys.readouterr().err
    assert main(["--write", "--root", str(root)]) == 0
    assert main(["--check", "--root", str(root)]) == 0
    text = (root / README).read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "0.70 [0.60, 0.80]" in text
    assert "old" not in text


def test_figures_are_of_the_load_at_which_stock_vllm_saturates():
    found = summary()
    found["by_load"]["another fleet: 0.85"] = found["by_load"]["a fleet, two: 1"]
    block = " ".join(render_block(found).split())
    assert (
        "a fleet, two 0.70 [0.60, 0.80], 0.70 [0.60, 0.80] and 0.70 [0.60, 0.80] (8 pairs); requests kept apart from"
        in block
    )
    assert "another" not in block
    assert "simulated with step times of a clock" in block
    assert max(map(len, render_block(found).splitlines())) <= 120
    del found["by_load"]["a fleet, two: 1"]
    with pytest.raises(ValueError, match="no run at load 1"):
        render_block(found)


def test_measured_step_times_come_first_and_composed_ones_not_beside_them():
    figures = summary()["by_load"]["a fleet, two: 1"]
    most = {**figures, "against_vllm": {**figures["against_vllm"], "ttft_mean": {**RATIO, "pairs": 16}}}
    composed = {"h200-qwen3-30b-a3b-kernels-dp2, one server: 1": figures}
    measured = {"b300-x-tp1-ep1, four: 1": figures, "b300-x-tp2-ep4-dp2, two: 1": most}
    block = " ".join(render_block({"clock": "a clock", "by_load": {**composed, **measured}}).split())
    assert (
        "b300-x, two 0.70 [0.60, 0.80], 0.70 [0.60, 0.80] and 0.70 [0.60, 0.80] (16 pairs); b300-x, four 0.70" in block
    )
    assert "kernels" not in block
    assert "h200-qwen3-30b-a3b-kernels-dp2, one server 0.70" in " ".join(
        render_block({"clock": "a clock", "by_load": composed}).split()
    )


def test_an_interval_must_stand_on_the_page_linked_after_it(root, capsys):
    main(["--write", "--root", str(root)])
    capsys.readouterr()
    page, readme = root / "docs" / "measuring.md", root / README
    page.write_text("| **1.05 [1.02, 1.08]** |\n")
    kept = readme.read_text()
    readme.write_text(f"{kept}\n1.05\n[1.02, 1.08] ([measured](docs/measuring.md#there))\n")
    assert main(["--check", "--root", str(root)]) == 0
    readme.write_text(f"{kept}\n1.06 [1.02, 1.08] ([measured](docs/measuring.md#there)) 1.05 [1.02, 1.08]\n")
    assert main(["--check", "--root", str(root)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "1.06 [1.02, 1.08] is not in docs/measuring.md",
        "1.05 [1.02, 1.08] is not in any page linked after it",
    ]


def test_the_repository_states_no_figure_without_its_page():
    assert list(find_unsupported((ROOT / README).read_text(), ROOT)) == []


def test_a_figure_that_was_changed_by_hand_is_found(root):
    main(["--write", "--root", str(root)])
    path = root / README
    path.write_text(path.read_text().replace("0.70", "0.50", 1))
    assert "0.50" in path.read_text()
    assert main(["--check", "--root", str(root)]) == 1


@pytest.mark.parametrize("broken", ["no marks", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_without_its_marks_nothing_is_written(root, broken):
    (root / README).write_text(broken)
    assert main(["--write", "--root", str(root)]) == 1
    assert (root / README).read_text() == broken


def test_without_results_it_says_so(root, capsys):
    (root / SUMMARY).unlink()
    assert main(["--check", "--root", str(root)]) == 1
    assert str(SUMMARY) in capsys.readouterr().err


def test_an_interval_without_an_end():
    block = render_block(summary(high=None))
    assert "0.70 [0.60, inf]" in block
    assert replace_block(f"{BEGIN}{END}", block) == f"{BEGIN}\n{block}{END}"
