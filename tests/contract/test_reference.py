"""The page of interfaces has the fields of the types, and says what each of them means."""

from pathlib import Path

import pytest
from moe_contract.reference import DOCUMENTS, PAGE, main, render_page, render_table

ROOT = Path(__file__).parents[2]


def test_the_page_is_generated_and_has_every_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--check", "--root", str(ROOT)]) == 0
    text = (ROOT / PAGE).read_text("utf-8")
    for name, document in DOCUMENTS.items():
        assert f"<!-- generated: {name} -->\n{render_table(document)}<!-- end -->" in text
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / PAGE).write_text("<!-- generated: agent_state -->\nold\n<!-- end -->\n")
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "run `make generate`" in capsys.readouterr().err
    assert main(["--write", "--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_says_its_type_and_meaning(name: str) -> None:
    for line in render_table(DOCUMENTS[name]).splitlines()[2:]:
        path, kind, _, meaning = (cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|"))
        assert kind not in ("", "value"), path
        assert meaning, path


def test_a_block_of_an_unknown_document_is_an_error() -> None:
    with pytest.raises(KeyError):
        render_page("<!-- generated: nothing -->\n<!-- end -->")
