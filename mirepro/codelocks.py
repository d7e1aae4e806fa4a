"""Generated locks of the code that a stage's result depends on: `{module: sha256 of its canonical syntax tree}`.

A stage depends on its lock instead of on source files, so that a comment, a docstring or another stage's code
invalidates nothing. Only the standard library is used, and the same hashes come out on Python 3.11 to 3.13.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mirepro import files
from mirepro.errors import UserError

ENTRIES = {
    "data": "mirepro.data",
    "pretrain": "mirepro.pretrain",
    "evaluate": "mirepro.transfer.evaluate",
    "controls": "mirepro.transfer.controls",
    "detect": "mirepro.transfer.detection",
    "toy": "mirepro.toy",
    "tables": "mirepro.report.tables",
    "report": "mirepro.report.page",
}
"""The module that each stage runs."""

TEXTS = {
    "tables": ("published/{profile}.csv", "mirepro/report/claims.yaml", "mirepro/report/table.schema.json"),
    "report": ("docs/deviations.md", "mirepro/report/templates/page.html.j2", "mirepro/report/templates/style.css"),
}
"""Files beside the package that a stage reads where they exist."""

OPERATORS = "mirepro.ops"
"""Stands for compiled code: its version and golden outputs count, not its source; a faster kernel changes nothing."""

SLICED = "mirepro.params"
"""Of this module only the definitions count that a closure names: one stage's parameters are no other's business."""

DATA_SUFFIXES = (".json", ".yaml", ".html", ".j2", ".css", ".csv")
"""Of files in a sub-package that are no Python; anything else (an editor's leftovers) decides no result."""

_POSITIONS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def canonical(node: ast.AST) -> str:
    """Text of a syntax tree without positions, comments, docstrings and fields that depend on Python's version."""
    if isinstance(node, ast.Constant):
        return f"Constant({type(node.value).__name__} {node.value!r})"
    parts = []
    for name, value in ast.iter_fields(node):
        if name in _POSITIONS or value is None or value == []:
            continue
        if isinstance(node, ast.JoinedStr):
            value = _joined(value)
        parts.append(f"{name}={_value(value)}")
    return f"{type(node).__name__}({', '.join(parts)})"


def _value(value: object) -> str:
    if isinstance(value, ast.AST):
        return canonical(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value if not _is_text(item)) + "]"
    return repr(value)


def _is_text(node: object) -> bool:
    """A string that stands as a statement: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _joined(parts: list[ast.expr]) -> list[ast.expr]:
    """Parts of an f-string with neighbouring texts merged: Python's versions split them differently."""
    result: list[ast.expr] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            result[-1] = ast.Constant(str(last.value) + str(part.value))
        elif not (isinstance(part, ast.Constant) and part.value == ""):
            result.append(part)
    return result


def digest(text: str) -> str:
    """Hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def source_digest(source: str) -> str:
    """The hash of a module's source."""
    return digest(canonical(ast.parse(source)))


@dataclass
class Sources:
    """The package's modules, parsed at most once.

    Attributes:
        root: The repository's root, which holds `mirepro/`.
    """

    root: Path
    trees: dict[str, ast.Module] = field(default_factory=dict)

    def path(self, module: str) -> Path | None:
        """The file of a module, None where no such module exists."""
        base = self.root.joinpath(*module.split("."))
        return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)

    def tree(self, module: str) -> ast.Module:
        """The parsed module.

        Raises:
            UserError: The module is missing or has a syntax error.
        """
        if module not in self.trees:
            path = self.path(module)
            if path is None:
                raise UserError(f"{module}: no such module under {self.root}; restore the file")
            try:
                self.trees[module] = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError) as error:
                line = getattr(error, "lineno", None)
                raise UserError(f"{path}:{line or 0}: {error.args[0]}; repair the file") from error
        return self.trees[module]

    def imports(self, module: str) -> set[str]:
        """Modules of the package that a module imports, wherever in its source; type checking alone does not count."""
        package = module if (self.path(module) or Path()).name == "__init__.py" else module.rpartition(".")[0]
        found: set[str] = set()
        for node in _running(self.tree(module)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(node, package)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    found.add(inner if self.path(inner) else base)
        return {name for name in found if name.startswith("mirepro.") and self.path(name)}

    def closure(self, entry: str) -> set[str]:
        """The entry and everything it imports by name; the registry finds objectives at run time, by their own locks.

        A package's `__init__` counts where something is taken from it, not for lying on the way to a submodule.
        """
        seen: set[str] = set()
        todo = [entry]
        while todo:
            module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            if module != OPERATORS:
                todo += self.imports(module)
        return seen

    def names(self, modules: Iterable[str]) -> set[str]:
        """Every identifier that appears in the modules."""
        nodes = [node for module in modules for node in ast.walk(self.tree(module))]
        found = {node.id for node in nodes if isinstance(node, ast.Name)}
        found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        return found | {a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _running(node)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module an import names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = ".".join(parts[: len(parts) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


def sliced(tree: ast.Module, names: set[str]) -> str:
    """Canonical text of a module reduced to the definitions that `names` reach, plus all its other statements."""
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    others = [node for node in tree.body if node not in definitions.values()]
    todo = {name for name in definitions if name in names} | {n for o in others for n in _used(o, definitions)}
    kept: set[str] = set()
    while todo - kept:
        name = (todo - kept).pop()
        kept.add(name)
        todo |= _used(definitions[name], definitions)
    return _value([node for node in tree.body if node in others or getattr(node, "name", None) in kept])


def _used(node: ast.AST, definitions: dict[str, ast.ClassDef | ast.FunctionDef]) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & definitions.keys()


def lock(sources: Sources, entry: str) -> dict[str, str]:
    """`{module: hash}` of an entry's closure, with the data files of its sub-packages and the operators' version."""
    modules = sources.closure(entry)
    python = modules - {OPERATORS, SLICED}
    result = {module: digest(canonical(sources.tree(module))) for module in python}
    if SLICED in modules:
        result[SLICED] = digest(sliced(sources.tree(SLICED), sources.names(python)))
    if OPERATORS in modules:
        result[OPERATORS] = files.sha256(_version(sources.root))
    return result | _texts(sources, python)


def _version(root: Path) -> Path:
    path = root / "mirepro" / "ops_version.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it pins the compiled operators, restore it from git")
    return path


def _texts(sources: Sources, modules: set[str]) -> dict[str, str]:
    """Files that are no Python (templates, schemas, claims) in the sub-packages of the modules."""
    found: dict[str, str] = {}
    for module in modules:
        path = sources.path(module)
        if path is None or path.parent == sources.root / "mirepro":
            continue
        for file in path.parent.rglob("*"):
            if file.is_file() and file.suffix in DATA_SUFFIXES:
                found[str(file.relative_to(sources.root))] = files.sha256(file)
    return found


def write(root: Path, profile: str, objectives: Iterable[str]) -> None:
    """Writes `locks/<profile>/<stage>.json` and `locks/<profile>/objectives/<name>.json`, and drops older others.

    Args:
        root: The repository's root.
        profile: The profile's name.
        objectives: Keys of the objectives that its rows use.

    Raises:
        UserError: A module is missing or broken, or an objective is unknown.
    """
    sources = Sources(root)
    folder = root / "locks" / profile
    made = {f"{stage}.json": lock(sources, entry) | _beside(root, profile, stage) for stage, entry in ENTRIES.items()}
    for name in objectives:
        module = f"mirepro.objectives.{name}"
        if sources.path(module) is None:
            raise UserError(f"objective {name!r}: no file mirepro/objectives/{name}.py; correct `rows` in params.yaml")
        made[f"objectives/{name}.json"] = lock(sources, module)
    for path in folder.rglob("*.json"):
        if str(path.relative_to(folder)) not in made:
            path.unlink()
    for relative, content in made.items():
        files.write_json(folder / relative, content)


def _beside(root: Path, profile: str, stage: str) -> dict[str, str]:
    names = [pattern.format(profile=profile) for pattern in TEXTS.get(stage, ())]
    return {name: files.sha256(root / name) for name in names if (root / name).is_file()}
