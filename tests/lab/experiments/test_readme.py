"""The README's figures: those of the summary, and no others."""

import json

import pytest
from moe_lab.experiments.readme import BEGIN, END, README, SUMMARY, main, render_block, replace_block

RATIO = {"value": 0.7012, "low": 0.6, "high": 0.8, "pairs": 8}
COLUMNS = ("ttft_mean", "ttft_p99", "ttft_p99_longest", "tpot_mean", "output_tokens_per_s")


def summary(value=0.7012, high=0.8):
    ratios = {name: {**RATIO, "value": value, "high": high} for name in COLUMNS}
    knee = {
        "workloads": ["azure", "twoEnd"],
        "against_vllm": ratios,
        "against_best": ratios,
        "against_best_in_ttft": ratios,
    }
    return {"runs": 12, "seeds": 2, "at_knee": {"a fleet": knee}}


@pytest.fixture
def root(tmp_path):
    (tmp_path / SUMMARY).parent.mkdir(parents=True)
    (tmp_path / SUMMARY).write_text(json.dumps(summary()))
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


def test_seeds_kept_apart_are_a_sentence():
    found = summary()
    assert "nothing of the product was chosen on" not in render_block(found)
    found["kept_apart"] = {"a fleet, two: 1": found["at_knee"]["a fleet"]}
    told = render_block(found).splitlines()[-1]
    assert "(a fleet, two, 100% of the load, 8 pairs)" in told
    assert told.count("0.70 [0.60, 0.80]") == 2


def test_a_figure_that_was_changed_by_hand_is_found(root):
    main(["--write", "--root", str(root)])
    path = root / README
    path.write_text(path.read_text().replace("0.70", "0.50", 1))
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


def test_an_interval_without_an_end_and_a_column_without_a_pair():
    made = summary(high=None)
    made["at_knee"]["a fleet"]["against_best"] = dict.fromkeys(COLUMNS)
    block = render_block(made)
    assert "0.70 [0.60, inf]" in block
    assert "| - |" in block
    assert replace_block(f"{BEGIN}{END}", block) == f"{BEGIN}\n{block}{END}"
