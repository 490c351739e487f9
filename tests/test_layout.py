"""The law of imports and the layout traps, read off the source tree."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vidworld"
LEVELS = {
    **dict.fromkeys(
        ("errors", "config", "contract", "files", "types", "media", "output", "page", "plots", "quantize"), 0
    ),
    **dict.fromkeys(("data", "tokenizers", "model", "diffusion", "lab"), 1),
    "world": 2,
    **dict.fromkeys(("trainer", "evaluation", "serving"), 3),
    **dict.fromkeys(("cli", "demo", "demo_tune", "lab_command", "__main__", "__init__"), 4),
}
FORBIDDEN = {"world": {"data", "lab"}}
SCRIPTS = ("training", "datasets", "tools", "configs")


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module != "vidworld" else [f"vidworld.{a.name}" for a in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("vidworld.")}
    return rooms


def violations(room: str, source: str) -> list[str]:
    """What a module of `room` imports against the law."""
    mine = LEVELS[room]
    wrong = []
    for other in imported_rooms(source) - {room, "__version__", "load"}:
        theirs = LEVELS[other]
        sideways = theirs == mine and mine not in (0, 4)
        if theirs > mine or sideways or other in FORBIDDEN.get(room, ()):
            wrong.append(f"{room} (L{mine}) imports {other} (L{theirs})")
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_law(path):
    # The package's lazy `load` is the one door that opens upwards.
    if path != PACKAGE / "__init__.py":
        assert violations(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("types", "from vidworld.model.dit import CausalDiT"),
        ("model", "import vidworld.diffusion.path"),
        ("world", "def f():\n    from vidworld.data import shards"),
        ("trainer", "from vidworld import evaluation"),
    ],
)
def test_import_law_sees_violations(room, source):
    assert violations(room, source)


def test_scripts_and_tests_are_not_packages():
    found = [str(p) for folder in (*SCRIPTS, "tests") for p in (ROOT / folder).rglob("__init__.py")]
    assert found == []


def test_no_script_is_named_like_a_dependency():
    taken = {
        "torch",
        "diffusers",
        "accelerate",
        "webdataset",
        "xformers",
        "deepspeed",
        "wandb",
        "pytest",
        "av",
    }
    scripts = {p.stem for folder in SCRIPTS for p in (ROOT / folder).rglob("*.py")}
    assert not scripts & (taken | {"datasets", "transformers", "numpy", "yaml", "types"})


def test_optional_packages_are_not_imported_at_module_top():
    optional = {"accelerate", "deepspeed", "diffusers", "transformers", "webdataset", "wandb", "torchmetrics"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert (module or "").split(".")[0] not in optional, path


def test_no_utils_drawers_and_no_very_long_files():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in ("utils", "helpers", "misc", "common"), path
        assert len(path.read_text().splitlines()) <= 420, path


def test_tracked_tree_is_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.exists()) < 30 * 2**20
