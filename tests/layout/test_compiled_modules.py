"""The modules that `make compile-gateway` compiles: they exist, and none of their classes is extended outside them."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def compiled() -> list[Path]:
    """The list of the script, which needs mypyc to be imported."""
    tree = ast.parse((ROOT / "images" / "compile_gateway.py").read_text("utf-8"))
    wanted = {"ENGINE", "GATEWAY", "MODULES"}
    body = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id in wanted]
    names: dict[str, tuple[str, ...]] = {}
    exec(compile(ast.Module(body, []), "compile_gateway.py", "exec"), names)
    return [ROOT / path for path in names["MODULES"]]


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]


def test_each_compiled_module_is_there_once():
    paths = compiled()
    assert len(paths) == len(set(paths)) > 20
    assert [path for path in paths if not path.is_file()] == []


def test_a_class_that_extends_a_compiled_one_is_compiled_too():
    paths = compiled()
    names = {row.name for path in paths for row in classes(path)}
    extending = [
        (str(path.relative_to(ROOT)), row.name)
        for folder in ("gateway", "operator", "bench", "scheduling")
        for path in (ROOT / folder).rglob("*.py")
        if path not in paths
        for row in classes(path)
        if names & {base.id for base in row.bases if isinstance(base, ast.Name)}
    ]
    assert extending == []
