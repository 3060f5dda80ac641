"""Write the pages of the reference: one a folder of the package, with each of its modules, for mkdocstrings to fill.

    python scripts/reference.py TREE FOLDER    (scripts/docs calls it)

TREE holds the package as it installs (scripts/link_tree.sh). Nothing is imported: the code is read as it is written.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def names_of(init: Path) -> tuple[list[str], list[str]]:
    """What a package's ``__init__.py`` lists in ``__all__``, and which functions and classes it defines itself."""
    public: list[str] = []
    own = []
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.literal_eval(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            own.append(node.name)
    return public, own


def page(package: str, folder: Path) -> Iterator[str]:
    """The lines of a folder's page: what the package says of itself, its public names, its modules."""
    public, own = names_of(folder / "__init__.py")
    yield f"# {package}\n"
    public = [name for name in public if not name.startswith("_")]  # no page shows __version__
    if public:
        yield "Public names: " + ", ".join(f"[`{name}`][{package}.{name}]" for name in public) + ".\n"
    hidden = "show_root_heading: false, show_root_toc_entry: false"
    yield f"::: {package}\n    options: {{members: {own or 'false'}, {hidden}}}\n"
    for module in sorted(folder.glob("*.py")):
        if not module.stem.startswith("_"):
            yield f"::: {package}.{module.stem}\n"


def main() -> None:
    """Command line."""
    tree, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    for name, _, files in os.walk(tree / "saekit", followlinks=True):
        if "__init__.py" in files and sum(file.endswith(".py") for file in files) > 1:
            package = ".".join(Path(name).relative_to(tree).parts)
            (out / f"{package}.md").write_text("\n".join(page(package, Path(name))))


if __name__ == "__main__":
    main()
