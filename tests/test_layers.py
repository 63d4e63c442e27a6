"""Who may import whom, who may print, and who may need torch: read from the source, nothing is run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "htsat"
#: from the ground up: a room imports those before it and itself. ``files`` writes bytes whole or not at all, for all of
#: them; ``fetch`` brings one address to one file; ``formats`` is words and text and knows no sound; ``plot`` draws what
#: it is given, with the mel filters of ``audio``, and knows no network.
ORDER = (
    "errors", "files", "fetch", "config", "labels", "events", "grid", "formats", "audio", "plot", "model", "detection",
    "metrics", "backends", "hearing", "live", "predict", "client", "data", "evaluation", "training", "apps",
    "commands", "cli",
)  # fmt: skip
#: the lazy front door, and the command's other name
DOORS = ("__init__", "__main__")
WITH_TORCH = ("model", "data", "evaluation", "training", "apps")
WITHOUT_TORCH = (*(room for room in ORDER if room not in WITH_TORCH), *DOORS)
#: what may be printed from or end the process
SPEAKERS = ("cli", "apps", "commands")
MODULES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def dotted(path: Path) -> str:
    return ".".join(("htsat", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, *, at_import_time: bool = False):
    """Yield (line, module) of every import; those in functions and for type checkers only if not ``at_import_time``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            # `from htsat import x` may mean the module htsat.x
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif not at_import_time or not (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_typing_only(node)
        ):
            yield from imports(node, at_import_time=at_import_time)


def upward(tree: ast.AST, home: str) -> list[str]:
    """Return the imports that a module of room ``home`` may not have."""
    found = []
    for line, module in imports(tree):
        parts = module.split(".")
        if parts[0] == "htsat" and len(parts) > 1 and parts[1] in ORDER and ORDER.index(parts[1]) > ORDER.index(home):
            found.append(f"line {line}: {module}")
    return found


def heavy(tree: ast.AST) -> list[str]:
    packages = (
        "torch", "onnxruntime", "openvino", "onnx", "safetensors", "matplotlib", "transformers", "huggingface_hub",
    )  # fmt: skip
    found = imports(tree, at_import_time=True)
    return [f"line {line}: {module}" for line, module in found if module.split(".")[0] in packages]


def spoken(tree: ast.AST) -> list[str]:
    """Return the calls that write to the terminal or end the process."""
    names = ("print", "input", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write")
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [f"line {call.lineno}: {name}" for call in calls if (name := ast.unparse(call.func)) in names]


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_module_has_its_place():
    assert len(MODULES) > 20
    assert {room(path) for path in MODULES} - set(ORDER) == set(DOORS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module_keeps_to_its_place(path):
    tree, home = parsed(path), room(path)
    if home not in DOORS:
        assert upward(tree, home) == []
    if home not in SPEAKERS:
        assert spoken(tree) == []
    if home in WITHOUT_TORCH:
        assert heavy(tree) == []


def test_modules_do_not_import_in_circles():
    graph = {}
    for path in MODULES:
        names = {module for _, module in imports(parsed(path), at_import_time=True)}
        names |= {name.rpartition(".")[0] for name in names}
        graph[dotted(path)] = names
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module in done:
            return
        for other in graph[module] & graph.keys() - {"htsat"}:
            visit(other, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("check", "source", "caught"),
    [
        (lambda tree: upward(tree, "audio"), "def f():\n    from htsat.model.hub import resolve", True),
        (lambda tree: upward(tree, "audio"), "from htsat import predict", True),
        (lambda tree: upward(tree, "audio"), "from htsat.errors import AudioError\nimport htsat.audio.chunk", False),
        (heavy, "try:\n    import torch.nn\nexcept ImportError:\n    pass", True),
        (heavy, "class A:\n    import torch", True),
        (heavy, "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch", False),
        (spoken, "def f():\n    print(1)", True),
        (spoken, "import sys\nsys.exit(1)", True),
        (spoken, "raise SystemError", False),
    ],
)
def test_the_checks_catch_what_they_are_for(check, source, caught):
    assert bool(check(ast.parse(source))) == caught


def test_import_is_light():
    """The package alone imports nothing; what needs no network imports no torch."""
    script = """
import sys
import htsat
first = sorted({"torch", "numpy", "soundfile", "typer"} & set(sys.modules))
import htsat.audio.decode, htsat.audio.resample, htsat.audio.chunk, htsat.detection.decoder, htsat.plot
import htsat.metrics.detection, htsat.metrics.tagging, htsat.formats, htsat.labels, htsat.predict, htsat.cli
htsat.Event, htsat.FrameGrid, htsat.Predictor, dir(htsat)
print(first, sorted({"torch", "matplotlib", "sklearn", "huggingface_hub"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert (result.stdout, result.stderr) == ("[] []\n", "")


def test_every_public_name_can_be_had():
    import htsat

    assert sorted(dir(htsat)) == sorted(htsat.__all__)
    for name in htsat.__all__:
        assert getattr(htsat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Predictr'"):
        htsat.Predictr  # noqa: B018
