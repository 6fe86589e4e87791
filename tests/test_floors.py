"""The building's own rules: imports point downward, the way in is light, and no file can run code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.plugins import TABLES, table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minigpt"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "errors": 0,
    "terminal": 0,
    "durable": 0,
    "choices": 0,
    "plugins": 1,
    "tokenizer": 1,
    "model": 1,
    "data": 2,
    "checkpoint": 2,
    "sampling": 3,
    "evaluation": 4,
    "internals": 5,
    "training": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}
# The rooms of a package, in the way of the data: a room imports only rooms before it. What stands beside them (what
# a user calls) is free.
ROOMS = {
    "sampling": ("settings", "draws", "processors", "loop", "search"),
    "internals": ("access", "attribution", "causal", "features", "dynamics", "page"),
    "training": ("recipe", "plan", "processes", "run"),
    "cli": ("study",),
}
MOST_FILES = 16  # of Python in a folder
MOST_AT_THE_ROOT = 8
# Third-party packages with one home. (huggingface's tokenizers trains and reads vocabularies.)
HOMES = {
    "lightning": ("training",),
    "wandb": ("training",),
    "tiktoken": ("tokenizer",),
    "tokenizers": ("tokenizer",),
    "safetensors": ("checkpoint", "interop"),
    "transformers": (),
}


def room(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every absolute module name a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{here} has no floor yet"
    for name in imports(path):
        if name == "minigpt" or not name.startswith("minigpt."):
            continue
        there = name.split(".")[1]
        allowed = there in (here, "errors") or FLOORS[there] < FLOORS[here]
        assert allowed, f"{path.name} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"


def loaded_with(path: Path) -> list[str]:
    """What is imported when a file is loaded: not what is imported for types alone, or inside functions."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_rooms_before_it(package: str) -> None:
    rooms = ROOMS[package]
    assert {path.name for path in (PACKAGE / package).iterdir() if (path / "__init__.py").is_file()} == set(rooms)
    for here in rooms:
        for path in (PACKAGE / package / here).glob("*.py"):
            for name in loaded_with(path):
                there = name.removeprefix(f"minigpt.{package}.").split(".")[0] if f".{package}." in name else ""
                if there in rooms:
                    assert rooms.index(there) <= rooms.index(here), f"{package}/{here}/{path.name} imports {name}"


def test_no_folder_holds_more_than_a_reader_takes_in() -> None:
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        most = MOST_AT_THE_ROOT if folder == PACKAGE else MOST_FILES
        assert len(list(folder.glob("*.py"))) <= most, folder


def test_no_import_cycle_between_files() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    # What is imported when a file is loaded; imports inside functions come later and cannot make a cycle.
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        modules = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module:
                modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        edges[name] = {module for module in modules if module in names and module != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name in done:
            return
        for following in edges[name]:
            visit(following, (*trail, name))
        done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_home(path: Path) -> None:
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or room(path) in homes, f"{path} imports {name}"


SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: path.name)
def test_nothing_loaded_can_run_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not set(imports(path)) & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "yaml.load",
            "yaml.full_load",
            "yaml.unsafe_load",
            "yaml.load_all",
            "yaml.unsafe_load_all",
            "torch.jit.load",
            "torch.package.PackageImporter",
            "torch.hub.load",
            "runpy.run_path",
            "os.system",
        )
        assert not any(k.arg in ("allow_pickle", "trust_remote_code") for k in node.keywords), path
        if called == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_no_file_compares_the_name_of_a_choice() -> None:
    """What code must know about a choice is an attribute of it or a fact of its row; then plug-ins are no last case."""
    kinds = ("norm", "position", "activation", "optimizer", "schedule", "tokenizer", "reader", "logger", "processor")
    names = {name for kind in kinds for name in table(kind)} - {"none", "text", "file"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)} & names
                fields = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
                chosen = fields & {"norm", "position", "activation", "schedule", "name", "kind", "log", "suffix"}
                assert not (compared and chosen), f"{path}:{node.lineno} compares {compared}"
            elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
                assert node.value.value not in names, f"{path}:{node.lineno}"


def test_every_row_of_a_table_can_be_made() -> None:
    for kind in TABLES:
        for name, row in table(kind).rows.items():
            assert table(kind)[name] is not None and (row.help or kind == "verb")


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(path): n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_importing_minigpt_loads_nothing_heavy() -> None:
    code = "import sys, minigpt; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert "minigpt" in loaded
    assert not {"torch", "lightning", "numpy", "tiktoken", "wandb", "transformers", "jsonargparse"} & set(loaded)


@pytest.mark.parametrize(
    "verb",
    ["", "train", "sample", "prepare", "eval", "info", "plan", "inspect", "lens", "heads", "patch", "dynamics", "sae"],
)
def test_help_loads_no_framework(verb: str) -> None:
    code = (
        "import sys; from minigpt.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'tiktoken', 'tokenizers', 'wandb'} & set(sys.modules)\n"
        "print('HEAVY', *heavy)"
    )
    arguments = [sys.executable, "-c", code, *([verb] if verb else []), "--help"]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.rstrip().endswith("HEAVY")
    assert "usage:" in out
