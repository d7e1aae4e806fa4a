"""Generated locks of the code that a stage's result depends on: `{module: sha256 of its canonical syntax tree}`.

A stage depends on its lock instead of on source files, so that a comment, a docstring or another stage's code
invalidates nothing. Only the standard library is used, and the same hashes come out on Python 3.11 to 3.13.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
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
    "tables": (
        "published/{profile}.csv",
        "mirepro/report/claims.{profile}.yaml",
        "mirepro/report/claims.yaml",
        "mirepro/report/table.schema.json",
    ),
    "report": ("docs/deviations.md", "mirepro/report/templates/page.html.j2", "mirepro/report/templates/style.css"),
}
"""Files beside the package that a stage reads where they exist."""

OWNED = "claims.*.yaml"
"""Files of single profiles; only those that `TEXTS` names count."""

OPERATORS = "mirepro.ops"
"""Stands for compiled code: its version and golden outputs count, not its source; a faster kernel changes nothing."""

SLICED = ("mirepro.params", "mirepro.determinism")
"""Of these modules only the definitions count that a closure names: one stage's parameters are no other's business."""

COMPUTING = ("pretrain", "evaluate", "controls", "detect", "toy")
RUNNER = {
    "mirepro.determinism": {"environment", "configure_torch"},
    "mirepro.params": {"build", "plain"},
    "mirepro.profiles": {"Profile.build", "Profile.run", "Profile.recipe", "merge"},
}
"""What the runner does to the results of these stages: it sets the libraries up and resolves the parameters."""

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


KEPT = 256
"""Syntax trees, and what was found out about them, that a process remembers; nothing ever changes a tree."""


@lru_cache(KEPT)
def parsed(source: str) -> ast.Module:
    """The syntax tree of a source; an equal source has the same one, which makes repeated locks cheap."""
    return ast.parse(source)


@lru_cache(KEPT)
def tree_digest(tree: ast.Module) -> str:
    """The hash of a parsed module."""
    return digest(canonical(tree))


def source_digest(source: str) -> str:
    """The hash of a module's source."""
    return tree_digest(parsed(source))


@dataclass
class Sources:
    """The package's modules, looked for and parsed at most once.

    Attributes:
        root: The repository's root, which holds `mirepro/`.
    """

    root: Path
    trees: dict[str, ast.Module] = field(default_factory=dict)
    paths: dict[str, Path | None] = field(default_factory=dict)

    def path(self, module: str) -> Path | None:
        """The file of a module, None where no such module exists."""
        if module not in self.paths:
            base = self.root.joinpath(*module.split("."))
            places = (base / "__init__.py", base.with_suffix(".py"))
            self.paths[module] = next((path for path in places if path.is_file()), None)
        return self.paths[module]

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
                self.trees[module] = parsed(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError) as error:
                line = getattr(error, "lineno", None)
                raise UserError(f"{path}:{line or 0}: {error.args[0]}; repair the file") from error
        return self.trees[module]

    def imports(self, module: str) -> set[str]:
        """Modules of the package that a module imports, wherever in its source; type checking alone does not count."""
        plain, taken = _imported(self.tree(module), self.package(module))
        found = set(plain)
        for base, name in taken:
            if f"{base}.{name}".startswith("mirepro."):
                found.add(f"{base}.{name}" if self.path(f"{base}.{name}") else base)
        return {name for name in found if name.startswith("mirepro.") and self.path(name)}

    def package(self, module: str) -> str:
        """The package that a module's relative imports start from."""
        return module if (self.path(module) or Path()).name == "__init__.py" else module.rpartition(".")[0]

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

    def names(self, target: str, modules: Iterable[str]) -> set[str]:
        """What the modules take from `target`: by `from target import x`, or as the attribute x of its short name."""
        found: set[str] = set()
        for module in modules:
            imported, attributes = _used(self.tree(module), self.package(module))
            found |= imported.get(target, set()) | attributes.get(target.rpartition(".")[2], set())
        return found


Names = dict[str, set[str]]


@lru_cache(KEPT)
def _imported(tree: ast.Module, package: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Modules imported whole, and `(module, name)` of what is taken from one; type checking alone does not count."""
    nodes = list(_running(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    taken = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return plain, {(_absolute(node, package), alias.name) for node in taken for alias in node.names}


@lru_cache(KEPT)
def _used(tree: ast.Module, package: str) -> tuple[Names, Names]:
    """`{module: names taken from it}` and `{short name: its attributes}`."""
    imported: Names = {}
    attributes: Names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.setdefault(_absolute(node, package), set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := _named(node.value)) is not None:
            attributes.setdefault(name, set()).add(node.attr)
    return imported, attributes


def _named(node: ast.expr) -> str | None:
    """The last name of `x` or `a.b.x`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


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


@lru_cache(KEPT)
def sliced(tree: ast.Module, names: frozenset[str]) -> str:
    """Canonical text of a module reduced to what `names` reach (`f`, `Class`, `Class.method`), in its order."""
    bound = [(name, node) for node in tree.body for name in _bound(node)]
    methods = [
        (f"{node.name}.{inner.name}", inner)
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, ast.FunctionDef)
    ]
    definitions: dict[str, list[ast.stmt]] = {}
    for name, node in [*bound, *methods]:
        definitions.setdefault(name, []).append(node)
    kept: set[str] = set()
    todo = set(names & definitions.keys())
    while todo - kept:
        name = (todo - kept).pop()
        kept.add(name)
        todo |= {
            inner.id for node in definitions[name] for inner in ast.walk(node) if isinstance(inner, ast.Name)
        } & definitions.keys()
    nodes = [node for name, node in [*bound, *methods] if name in kept]
    return _value(list({id(node): node for node in nodes}.values()))


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return []
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]


def lock(sources: Sources, entry: str, runner: Mapping[str, set[str]] | None = None) -> dict[str, str]:
    """`{module: hash}` of an entry's closure, with the data files of its sub-packages and the operators' version.

    Args:
        sources: The modules.
        entry: The module that the stage runs.
        runner: What counts beside the closure: names by module (`RUNNER`).
    """
    modules, runner = sources.closure(entry), runner or {}
    python = modules - {OPERATORS, *SLICED}
    result = {module: tree_digest(sources.tree(module)) for module in python}
    for module in sorted((modules & set(SLICED)) | runner.keys()):
        names = sources.names(module, python) | runner.get(module, set())
        result[module] = digest(sliced(sources.tree(module), frozenset(names)))
    if OPERATORS in modules:
        result[OPERATORS] = files.sha256(_version(sources.root))
    return result | _texts(sources, python)


def stage_lock(sources: Sources, stage: str) -> dict[str, str]:
    """The lock of a stage, or of `objectives/<name>`."""
    entry = ENTRIES.get(stage) or f"mirepro.{stage.replace('/', '.')}"
    return lock(sources, entry, RUNNER if stage in COMPUTING else None)


def _version(root: Path) -> Path:
    path = root / "mirepro" / "ops_version.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it pins the compiled operators, restore it from git")
    return path


def _texts(sources: Sources, modules: set[str]) -> dict[str, str]:
    """Files that are no Python (templates, schemas, claims) in the sub-packages of the modules."""
    found: dict[str, str] = {}
    paths = [sources.path(module) for module in modules]
    for folder in {path.parent for path in paths if path is not None} - {sources.root / "mirepro"}:
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix in DATA_SUFFIXES and not fnmatch(file.name, OWNED):
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
    made = {f"{stage}.json": stage_lock(sources, stage) | _beside(root, profile, stage) for stage in ENTRIES}
    for name in objectives:
        module = f"mirepro.objectives.{name}"
        if sources.path(module) is None:
            raise UserError(f"objective {name!r}: no file mirepro/objectives/{name}.py; correct `rows` in params.yaml")
        made[f"objectives/{name}.json"] = stage_lock(sources, f"objectives/{name}")
    for path in folder.rglob("*.json"):
        if str(path.relative_to(folder)) not in made:
            path.unlink()
    for relative, content in made.items():
        files.write_json(folder / relative, content)


def current(root: Path, needs: Iterable[str]) -> bool:
    """Whether the code locks among a stage's needs fit the code of this process.

    Args:
        root: The repository's root, which holds the locks.
        needs: Paths relative to the root; others than locks do not count.
    """
    sources = Sources(Path(__file__).resolve().parent.parent)
    for need in needs:
        folder, _, rest = need.partition("/")
        profile, _, name = rest.partition("/")
        if folder != "locks":
            continue
        stage = name.removesuffix(".json")
        if files.read_json(root / need) != stage_lock(sources, stage) | _beside(root, profile, stage):
            return False
    return True


def _beside(root: Path, profile: str, stage: str) -> dict[str, str]:
    names = [pattern.format(profile=profile) for pattern in TEXTS.get(stage, ())]
    return {name: files.sha256(root / name) for name in names if (root / name).is_file()}
