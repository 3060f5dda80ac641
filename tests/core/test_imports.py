"""Who may import whom: no circles, not even inside functions or for types alone, and one direction."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "saekit": "saekit",
    "activations": "saekit.activations",
    "trainers": "saekit.trainers",
    "evals": "saekit.evals",
}

# from the ground up; a file imports its own layer and those below it
LAYERS = {
    "storage": ("errors", "files", "finite", "interrupt", "lazy", "plugins", "reading", "seal", "settings", "version"),
    "kernels": ("code", "kernels", "machine", "no_installs", "ranks"),
    "dictionary": (
        *("allocation", "display", "embedded", "formats", "hub", "loading", "positions", "processing", "sae"),
        *("sae_config", "selection", "special_tokens", "zipf"),
    ),
    "activations": ("activations", "splicing"),
    "trainers": ("trainers",),
    "evals": ("evals",),
    "publishing": ("card", "publish"),
    "command line": ("__main__", "cli", "commands"),
}
BESIDE = {("evals", "trainers"), ("trainers", "evals")}  # they meet at the dictionary alone


def modules() -> dict[str, Path]:
    """Every file of the package, by the name that it is imported by."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


def imports(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules that a file imports anywhere; of a package's ``__init__`` alone where no module is named."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{path}: relative"
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return {each for each in found if each in known and each != name}


GRAPH = {name: imports(path, name, set(modules())) for name, path in modules().items()}
FACADES = {name for name, path in modules().items() if path.name == "__init__.py"}


def layer_of(name: str) -> str:
    head = name.split(".")[1] if "." in name else "version"
    return next(layer for layer, heads in LAYERS.items() if head in heads)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected parts of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_there_are_no_circles():
    assert not circles(GRAPH)


def test_imports_go_one_way():
    order = list(LAYERS)
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name != "saekit"
        and (order.index(layer_of(name)) < order.index(layer_of(other)) or (layer_of(name), layer_of(other)) in BESIDE)
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_whole_package():
    assert not [name for name, others in GRAPH.items() if "saekit" in others]
