"""The import law: who may know whom. A change of this file is a design decision."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = (ROOT, ROOT / "kernels_pallas", ROOT / "models", ROOT / "serve")
OURS = ("jaxcept", "jaxcept_kernels", "jaxcept_models", "jaxcept_serve")

# Each room and the rooms that it may import beside itself; the longest name that fits a module is its room.
LAW: dict[str, tuple[str, ...]] = {
    "jaxcept_kernels": (),
    "jaxcept_models": ("jaxcept_kernels",),
    "jaxcept.scheduler": (),
    "jaxcept.clock": (),
    "jaxcept.metrics": ("jaxcept.scheduler",),
    "jaxcept.engine": ("jaxcept.scheduler", "jaxcept.clock", "jaxcept.metrics"),
    "jaxcept.simulator": ("jaxcept.scheduler", "jaxcept.engine", "jaxcept.clock", "jaxcept.metrics"),
    "jaxcept.runner": ("jaxcept.scheduler", "jaxcept_models", "jaxcept_kernels"),
    "jaxcept.tools": (),
    "jaxcept.text": (),
    "jaxcept": ("jaxcept_models", "jaxcept_kernels"),  # composition
    "jaxcept_serve": ("jaxcept",),
}
STANDARD_LIBRARY_ONLY = ("jaxcept.scheduler", "jaxcept.engine", "jaxcept.clock", "jaxcept.metrics", "jaxcept.simulator")
WITHOUT_JAX = (*STANDARD_LIBRARY_ONLY, "jaxcept.tools", "jaxcept.text")


def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    found = {}
    for root in SOURCE_ROOTS:
        for package in OURS:
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_in(module: str, room: str) -> bool:
    """Whether a dotted name is the room or inside it."""
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    """The narrowest room that the module is in."""
    return max((room for room in LAW if is_in(module, room)), key=len)


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in the file; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_package_is_found():
    assert {module.partition(".")[0] for module in MODULES} == set(OURS)
    assert "jaxcept.scheduler.scheduler" in MODULES and "jaxcept_kernels.layout" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str):
    room = room_of(module)
    for name in imports(MODULES[module]):
        top = name.partition(".")[0]
        if top in OURS:
            allowed = (room, *LAW[room])
            assert any(is_in(name, each) for each in allowed), f"{module} imports {name}: {room} may not"
        elif room in STANDARD_LIBRARY_ONLY:
            assert top in sys.stdlib_module_names, f"{module} imports {name}: {room} has the standard library alone"
        elif room in WITHOUT_JAX:
            assert top not in ("jax", "jaxlib", "flax"), f"{module} imports {name}: {room} knows no device"


@pytest.mark.parametrize("module", [module for module, path in MODULES.items() if path.name == "__init__.py"])
def test_packages_are_a_docstring(module: str):
    if module != "jaxcept":  # the lazy public face
        body = ast.parse(MODULES[module].read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{module}/__init__.py is more than a docstring"


def loaded_after_importing(rooms: tuple[str, ...]) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded once everything in these rooms is imported."""
    names = [module for module in MODULES if any(is_in(module, room) for room in rooms)]
    program = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    path = ":".join(str(root) for root in SOURCE_ROOTS)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": path}, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_pure_tower_loads_the_standard_library_alone():
    loaded = loaded_after_importing(STANDARD_LIBRARY_ONLY)
    assert "jaxcept" in loaded
    assert not loaded & {"jax", "jaxlib", "numpy", "flax", "transformers"}


def test_tools_and_text_load_no_jax():
    loaded = loaded_after_importing(("jaxcept.tools", "jaxcept.text"))
    assert not loaded & {"jax", "jaxlib", "flax"}
