"""The order of the house: imports run downwards, files stay short, and the command line waits for no library."""

import ast
import subprocess
import sys

import pytest
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, ROOT

SCRIPTS = ["kvquant_simquant_ppl_eval", "kvquant_llama3_simquant"]
ORDER = [  # from top to bottom: a file imports only what stands below it, anywhere in its text
    *SCRIPTS, "run", "measuring", "endings", "stored", "command_line", "calibrated_flags", "flags",
    "evidence_flags", "parsing", "plans", "methods", "compare", "describe", "page_content", "presentation", "page",
    "tasks", "task_scores", "task_model", "retrieval", "needles", "texts", "tokens", "text_files", "models",
    "checkpoints", "prefixes", "memory", "speed", "faster_cpu", "faster_gpu", "cache_check", "sites", "attention",
    "component_plots", "position_plots", "retrieval_tables", "plots", "labels", "report_file", "report", "summary",
    "positions", "tails", "text_units", "fits", "calibration", "quantizer_file", "kvquant_file", "formats",
    "tables", "files", "text_names", "notices", "processes", "quant_utils",
]  # fmt: skip
TOP = {*(f"{name}.py" for name in SCRIPTS), "quant_utils.py", "requirements.txt", "README.md", "tests"}
HEAVY = {"torch", "transformers", "pyarrow", "pandas", "numpy", "accelerate"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "simquant").rglob("[!_]*.py")])


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_run_downwards(file):
    here = place_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert here is not None, f"{file.name} stands nowhere in ORDER"
    for module in imported(file):
        is_sibling = module.startswith("simquant.formats.") and file.parent.name == "formats"
        assert is_sibling or place_of(module) is None or place_of(module) > here, f"{file.name} imports {module}"
        assert place_of(module) is not None or not module.startswith("simquant"), f"{module} stands nowhere in ORDER"


def test_no_file_but_the_core_is_long():
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert lines.pop("quant_utils.py") <= 1000 and [name for name, count in lines.items() if count > 260] == []


def test_the_top_level_is_fixed():
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "__pycache__"}
    assert there - {"docs"} == TOP | {"simquant"}


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
        assert "examples:" in shown and "--first_few_fp16 N" in process.stdout
    elif "--version" in words:
        assert len(shown) == 1 and shown[0].startswith(f"{script.name} ")
