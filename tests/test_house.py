"""The order of the house: imports run downwards, files stay short, and the command line waits for no library."""

import ast
import subprocess
import sys

import pytest
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, ROOT

SCRIPTS = ["kvquant_simquant_ppl_eval", "kvquant_llama3_simquant"]
ORDER = [  # from top to bottom: a file imports only what stands below it, anywhere in its text
    *SCRIPTS, "run", "flags", "parsing", "methods",
    "describe", "texts", "models", "memory", "speed", "sites", "plots", "report", "quantizer_file", "kvquant_file",
    "formats", "files", "notices", "processes", "quant_utils",
]  # fmt: skip
TOP = {
    *(f"{name}.py" for name in SCRIPTS), "quant_utils.py", "requirements.txt", "README.md", "tests",
    "simquant", "docs",  # the others are the six fixed names
}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "pandas", "numpy", "accelerate"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "simquant").rglob("*.py")])


def names_of(files):
    """Return short names of files for pytest."""
    return [str(file.relative_to(ROOT)) for file in files]


def place_of(module):
    """Return where a dotted module of ours stands in ORDER; None for a library."""
    first, *rest = module.split(".")
    name = rest[0] if first == "simquant" and rest else first
    return ORDER.index(name) if name in ORDER else None


def imported(file):
    """Yield every module of ours that a file imports, at the top, in a function, or for types alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            is_package = node.module == "simquant"
            yield from (f"simquant.{alias.name}" for alias in node.names) if is_package else [node.module]


@pytest.mark.parametrize("file", FILES, ids=names_of(FILES))
def test_imports_run_downwards(file):
    if file.name == "__init__.py":
        assert list(imported(file)) == []
        return
    here = place_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert here is not None, f"{file.name} stands nowhere in ORDER"
    for module in imported(file):
        is_sibling = module.startswith("simquant.formats.") and file.parent.name == "formats"
        assert is_sibling or place_of(module) is None or place_of(module) > here, f"{file.name} imports {module}"
        assert place_of(module) is not None or not module.startswith("simquant"), f"{module} stands nowhere in ORDER"


@pytest.mark.parametrize("file", FILES, ids=names_of(FILES))
def test_no_file_but_the_core_is_long(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= (850 if file.name == "quant_utils.py" else 260)


def test_the_top_level_is_fixed():
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "__pycache__"}
    assert there <= TOP and there >= TOP - {"docs"}


@pytest.mark.parametrize("script", [DYNAMIC_SCRIPT, CALIBRATED_SCRIPT], ids=SCRIPTS)
@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["--version"], 0), ([NANO, "--abits", "9"], 2), ([NANO, "--nonsense"], 2)]
)
def test_help_and_a_mistyped_flag_wait_for_no_library(script, words, status):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(script)!r}, *{[*map(str, words)]!r}]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        f"print(sorted({HEAVY} & set(sys.modules)), status)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    *shown, last = process.stdout.splitlines()
    assert last == f"[] {status}"
    if "--help" in words:
        assert (
            all(len(line) <= 120 for line in shown) and "examples:" in shown and "--first_few_fp16 N" in process.stdout
        )
    elif "--version" in words:
        assert len(shown) == 1 and shown[0].startswith(f"{script.name} ")


@pytest.mark.parametrize("script", [DYNAMIC_SCRIPT, CALIBRATED_SCRIPT], ids=SCRIPTS)
def test_ctrl_c_is_silent_from_the_first_line_on(script):
    """Until the handler that prints a traceback is gone, nothing is imported that Python has not loaded itself."""
    before = []
    for statement in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            before += [statement.module] if isinstance(statement, ast.ImportFrom) else [n.name for n in statement.names]
        if "SIG_DFL" in ast.unparse(statement):
            break
    else:
        pytest.fail("the handler stays")
    assert set(before) <= {"signal", "sys"}
