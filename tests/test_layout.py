"""The shape of the project: who imports whom, what is shipped, what an import costs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_specstream"
LONGEST = 450  # lines of a file

# A part may import itself and the parts that stand below it.
ORDER = [
    {"__main__"},
    {"cli", "serve"},
    {"measure"},
    {"generate", "train", "converters"},
    {"load"},
    {"decode"},
    {"model"},
    {"kernels"},
    {"config", "hub", "profile", "files"},
    {"errors", "blas", "encode"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
HEAVY = ("mlx", "mlx_lm", "transformers", "torch", "huggingface_hub")


def sources() -> dict[tuple[str, ...], Path]:
    """Module path inside the package (converters lie beside it) -> file."""
    found = {}
    for base, prefix in ((PACKAGE, ()), (ROOT / "converters", ("converters",))):
        for file in sorted(base.rglob("*.py")):
            found[(*prefix, *file.relative_to(base).with_suffix("").parts)] = file
    return found


def imports(module: tuple[str, ...], file: Path) -> list[tuple[str, ...]]:
    """Absolute names of what a file imports; ours begin with ''."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = tuple(node.module.split(".")) if node.module else ()
            if node.level:  # relative: climb from this module's package
                name = ("", *module[: len(module) - node.level], *name)
            found += [(*name, alias.name) for alias in node.names]
    return [("", *name[1:]) if name[:1] == ("mlx_specstream",) else name for name in found]


def part_of(name: tuple[str, ...]) -> str | None:
    return name[1] if len(name) > 1 and name[1] in RANK else None


@pytest.mark.parametrize("module", sources(), ids=".".join)
def test_imports_go_one_way(module):
    own = module[0]
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in the order of imports"
    for name in imports(module, sources()[module]):
        assert name[0] != "torch", "torch is never imported"
        other = part_of(name) if name[0] == "" else None
        if other is None or other == own:
            continue
        assert RANK[own] < RANK[other], f"{'.'.join(module)} must not import {other}"


def test_train_never_imports_decode():
    for module, file in sources().items():
        if module[0] == "train":
            parts = {part_of(name) for name in imports(module, file) if name[0] == ""}
            assert not parts & {"decode", "generate", "measure"}


def test_only_a_few_files_know_the_internals_of_mlx_lm():
    """Its models and blocks; saving and trimming a prompt cache is for everybody."""
    known = (
        "seams",
        "projections",
        "cache",
        "support",
        "buffers",
        "window",
        "rope",
        "activation",
        "attention",
        "cpu",
        "prompt",
    )
    allowed = {("model", name) for name in known}
    for module, file in sources().items():
        inside = [n for n in imports(module, file) if n[:2] == ("mlx_lm", "models")]
        if module[0] == "cli":
            inside = [n for n in inside if n[2] != "cache"]
        own_architecture = module[0] == "model" and "ModelArgs" in file.read_text(encoding="utf-8")
        assert not inside or module in allowed or own_architecture, (module, inside)


def test_the_import_test_sees_a_wrong_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from ..decode.step import step\n    from .. import generate\n")
    assert [part_of(n) for n in imports(("model", "x"), file)] == ["decode", "generate"]


def test_every_package_is_shipped():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        f.parent for f in [*PACKAGE.rglob("__init__.py"), *ROOT.glob("converters/__init__.py")]
    }
    names = {
        ".".join(("mlx_specstream", *f.relative_to(PACKAGE).parts))
        if f.is_relative_to(PACKAGE)
        else "mlx_specstream.converters"
        for f in folders
    }
    assert names == set(listed)
    modules = {file.parent for file in sources().values()}
    assert modules == folders, "a folder of modules without __init__.py is not shipped"


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, mlx_specstream; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == ""


def test_public_names_are_there():
    import mlx_specstream

    for name in mlx_specstream.__all__:
        assert getattr(mlx_specstream, name) is not None
    assert callable(mlx_specstream.load)
    assert callable(mlx_specstream.generate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mlx_specstream.nothing


def test_no_file_is_too_long():
    folders = ("mlx_specstream", "converters", "tests", "benchmarks", "examples")
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    lengths = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert [str(f) for f, n in lengths.items() if n > LONGEST] == []
