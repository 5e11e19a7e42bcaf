"""The walls of the design: who imports whom, how heavy each stage is, and what may never be reached."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("frontend", "tokenizer_proc", "engine_proc", "detok_proc")
HEAVY = {
    "pipeline": {"sanic", "torch", "transformers", "tokenizers", "jinja2", "librosa", "xformers", "ray"},
    "frontend": {"torch", "transformers", "tokenizers", "jinja2", "librosa", "xformers"},
    "tokenizer_proc": {"torch", "sanic", "xformers"},
    "engine_proc": {"sanic", "jinja2", "librosa"},
    "detok_proc": {"torch", "transformers", "sanic", "jinja2", "librosa", "xformers"},
}
TORCH_FREE = ("request", "plan", "blocks", "scheduler", "core", "admission", "outputs", "null", "stats",
              "pooling/plan", "pooling/request", "pooling/scheduler", "pooling/core", "pooling/admission",
              "pooling/outputs", "pooling/null", "pooling/stats")
CODE = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "msgpack_numpy", "jsonpickle", "joblib"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, module, inside a function) of every import in a file."""
    found: list[tuple[int, str, bool]] = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                found.append((child.lineno, child.module or "", inside))
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))
    walk(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("folder", ("pipeline", *STAGES))
def test_stage_folders_import_only_what_the_design_allows(folder: str) -> None:
    others = set(STAGES) - {folder}
    for path in sources(folder):
        for line, module, inside in imports(path):
            top = module.split(".")[0]
            assert top not in others, f"{path}:{line} imports {module} of another stage"
            allowed = top == "ray" and inside
            assert allowed or top not in HEAVY[folder], f"{path}:{line} imports {module}"


def test_nothing_but_the_command_line_imports_the_launcher() -> None:
    for folder in ("pipeline", *STAGES):
        for path in sources(folder):
            if path.name in ("cli.py", "launcher.py", "serve_app.py"):
                continue
            assert "pipeline.launcher" not in {m for _, m, _ in imports(path)}, path


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_scheduling_half_of_the_engine_imports_no_torch(name: str) -> None:
    path = ROOT / "engine_proc" / f"{name}.py"
    if path.exists():
        assert not {m for _, m, _ in imports(path) if m.split(".")[0] in ("torch", "transformers")}


@pytest.mark.parametrize(("module", "forbidden"), [
    ("pipeline.cli", {"torch", "sanic", "transformers", "tokenizers"}),
    ("frontend.__main__", {"torch", "transformers", "tokenizers", "jinja2"}),
    ("tokenizer_proc.__main__", {"torch", "sanic"}),
    ("detok_proc.__main__", {"torch", "transformers", "sanic", "jinja2"}),
    ("engine_proc.core", {"torch", "transformers", "sanic"}),
    ("engine_proc.pooling.core", {"torch", "transformers", "sanic"}),
])
def test_each_stage_loads_no_heavy_module(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                            timeout=120).stdout.split()
    assert not forbidden & set(loaded)


def test_nothing_in_the_request_path_can_run_code_from_a_message() -> None:
    for folder in ("pipeline", *STAGES):
        for path in sources(folder):
            tree = ast.parse(path.read_text())
            assert not {m.split(".")[0] for _, m, _ in imports(path)} & CODE, path
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    name = node.func.id if isinstance(node.func, ast.Name) else ""
                    assert name not in ("eval", "exec", "__import__"), f"{path}:{node.lineno}"
                    attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                    assert attribute not in ("recv_pyobj", "send_pyobj"), f"{path}:{node.lineno}"
                    keywords = {k.arg: k.value for k in node.keywords}
                    if attribute == "load" and isinstance(node.func, ast.Attribute) \
                            and isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "np", "numpy"):
                        safe = keywords.get("weights_only") or keywords.get("allow_pickle")
                        assert isinstance(safe, ast.Constant), f"{path}:{node.lineno}"


def test_pickle_is_not_loaded_by_the_stages_own_modules() -> None:
    """Libraries may load pickle for themselves; what we check is that none of our modules holds it."""
    code = ("import sys\n"
            "import frontend.__main__, detok_proc.__main__, tokenizer_proc.__main__, engine_proc.core\n"
            "ours = ('pipeline', 'frontend', 'tokenizer_proc', 'engine_proc', 'detok_proc')\n"
            "bad = [n for n, m in sys.modules.items() if n.split('.')[0] in ours\n"
            "       and any(getattr(v, '__name__', '') in ('pickle', 'marshal', 'shelve') for v in vars(m).values())]\n"
            "print(bad)\n")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"


def test_the_core_of_the_engine_stays_small() -> None:
    lines = sum(len((ROOT / "engine_proc" / f"{name}.py").read_text().splitlines())
                for name in ("scheduler", "blocks", "request"))
    assert lines <= 650
