"""The rules that keep the house standing and that an import contract cannot see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "scheduling": {"moe_scheduling"},
    "contract": {"moe_contract"},
    "gateway": {"moe_gateway"},
    "node_agent": {"moe_agent"},
    "kernels": {"moe_kernels"},
    "operator": {"moe_operator"},
    "bench": {"moe_tools", "moe_lab"},
}


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_operator_is_not_a_package():
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_tests_are_not_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_package_shadows_pythons_operator():
    packages = [path.parent for path in tracked("*__init__.py")]
    assert [package for package in packages if package.name == "operator"] == []


@pytest.mark.parametrize("root", PACKAGES)
def test_each_source_root_has_its_packages_alone(root):
    assert {path.name for path in (ROOT / root).iterdir() if (path / "__init__.py").exists()} == PACKAGES[root]


@pytest.mark.parametrize("package", ["moe_gateway", "moe_operator"])
def test_no_torch_and_no_vllm_behind(package):
    script = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "sys.exit(' '.join({'torch', 'vllm', 'triton'} & set(sys.modules)) or None)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["moe_gateway.gateway", "moe_operator.kubernetes.operator"])
def test_processes_without_tables_of_experts_load_no_numpy(module):
    """It takes 14 MiB of memory, and a second of a start on a busy machine."""
    script = f"import sys, {module}; sys.exit('numpy' if 'numpy' in sys.modules else None)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_scheduling_reads_and_writes_nothing():
    forbidden = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
    for path in tracked("scheduling/*.py"):
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & forbidden, path


def test_kernels_need_torch_and_triton_alone():
    allowed = {"moe_kernels", "torch", "triton", *sys.stdlib_module_names}
    for path in tracked("kernels/*.py"):
        imports = {
            name.partition(".")[0] for node in ast.walk(ast.parse(path.read_text())) for name in imported_by(node)
        }
        assert imports <= allowed, path


def imported_by(node: ast.AST) -> list[str]:
    """Full names of the modules that an import statement names; a relative one stays within its package."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module]
    return []


def test_pins_are_names_and_versions_alone():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)] == []


def test_the_repository_names_no_index_and_no_machine():
    index = re.compile(
        r"https?://[a-z0-9.-]*(pypi|pythonhosted|npmjs|proxy\.golang|deb\.debian)|/ro" + r"ot/|/wo" + r"rk/"
    )
    texts = [path for path in tracked() if path.suffix in {".py", ".toml", ".txt", ".yaml", ".md", ".sh", ".lock", ""}]
    assert [
        str(path.relative_to(ROOT))
        for path in texts
        if index.search(path.read_text(errors="replace")) and path != Path(__file__)
    ] == []


def test_prerequisites_name_variables_of_lines_above():
    """Make expands a prerequisite where it reads the rule: a variable of a later line is empty there."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    set_at = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"(\w+) [:?]?=", line))}
    rules = [(number, line) for number, line in enumerate(lines) if re.match(r"[^\s#=]+:(?!=)", line)]
    assert rules
    assert [
        (name, line)
        for number, line in rules
        for name in re.findall(r"\$\((\w+)\)", line)
        if set_at.get(name, number) >= number
    ] == []


def test_the_list_of_targets_fits_a_terminal_of_80_columns() -> None:
    lines = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    described = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == described
    assert [line for line in lines if len(line) > 80] == []
