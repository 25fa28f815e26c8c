"""Layering: which package may import which, where a target's name may stand, and a run half without converters."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest

from tests.imports import PACKAGE, cycles, edges, imports, modules

#: Folder of evm_deploy/ -> what it may import of the others, itself always. Imports in functions and under
#: TYPE_CHECKING count. `evm_deploy` is the package's own file: its version, and public names, which are lazy.
LOW = {"_util", "errors"}
RUN = LOW | {"toolchain", "scan", "data", "tasks", "runtimes", "bundle"}
BUILD = RUN | {"model", "demo", "devices", "calib", "export", "evm_deploy"}
MAY_IMPORT = {
    "errors": set(),
    "_util": {"errors"},
    "toolchain": LOW,
    "scan": LOW | {"toolchain"},
    "model": LOW | {"toolchain", "scan", "data"},
    "data": LOW,
    "tasks": LOW | {"data"},
    "runtimes": LOW | {"toolchain", "scan", "data"},
    "bundle": RUN,
    "devices": LOW | {"toolchain", "runtimes"},
    "calib": RUN,
    "export": BUILD,
    "demo": RUN | {"model", "calib"},
    "bench": BUILD,
    "report": RUN | {"bench", "sweep", "evm_deploy"},
    "sweep": BUILD | {"bench"},
    "commands": BUILD | {"bench", "report", "sweep"},
    "cli": {"commands"},
    "evm_deploy": LOW | {"bundle", "runtimes", "model"},
}
PLACES = {
    "export": ("onnx", "openvino", "coreml", "tensorrt", "qnn", "litert", "executorch"),
    "runtimes": ("onnxruntime", "openvino", "coreml", "tensorrt", "mil", "qnn", "litert", "executorch"),
}
#: Places of a runtime that import another's: the first computes what the second cannot where it is.
BESIDE = {
    ("qnn", "onnxruntime"): "QNN is a plugin of ONNX Runtime",
    ("tensorrt", "onnxruntime"): "scans of the self-test, and the emulator of engines",
    ("coreml", "mil"): "the emulator of programs",
    ("mil", "coreml"): "coremltools, which reads programs",
}
#: What an app does not have, and the run half must not import.
NEVER = {"torch", "onnx", "evm_deploy.export", "evm_deploy.calib", "evm_deploy.bench", "evm_deploy.commands"}
#: Modules of the run half that may: the emulator of Core ML's programs computes them in torch.
EMULATOR = "evm_deploy.runtimes.mil"
#: Words of one target -> where they may stand in code beside its own folders.
WORDS = {
    r"tensorrt|\btrt\b|trt_rtx|trt-rtx|EngineSettings": "tensorrt",
    r"openvino": "openvino",
    r"\bqnn|qualcomm|\bhtp": "qnn",
    r"litert|tflite": "litert",
    r"executorch|\bpte\b": "executorch",
    r"core ?ml|coremltools|mlprogram|mlpackage": "coreml",
}
EXCEPTIONS = {
    "runtimes/registry.py": "the list",
    "export/targets.py": "the list",
    "export/settings.py": "the list of settings that are flags",
    "toolchain/openvino_extension.py": "finds and compiles the extension, for both halves of openvino",
    "toolchain/executorch_library.py": "finds and compiles the library, for both halves of executorch",
    "runtimes/mil/": "the emulator of coreml",
    "scan/mil.py": "the scan's lowering for coreml",
    "bench/bench_on_mac.py": "measures coreml in a bundle, without evm-deploy",
    "sweep/forms.py": "the default forms of a comparison",
    "runtimes/coreml/tools.py": "packages that coremltools imports need not be found: those of another target too",
    "runtimes/providers.py": "execution providers of ONNX Runtime that have the names of targets",
    "export/triton.py": "Triton's backends by target",
    "commands/export_flags.py": "the help of flags that name targets: it loads no target",
    "commands/matrix.py": "the help of --forms",
}
MODEL = re.compile("EVSS")
MODEL_PLACES = ("model/efficientvmamba/", "scan/fused.py")


def folder(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def broken(graph: dict[str, set[str]]) -> list[str]:
    """Imports that the table does not have."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if other.startswith("evm_deploy") and folder(other) not in {folder(module), *MAY_IMPORT[folder(module)]}
    ]


def beside(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Places of one target, or of one runtime, that import another's."""
    found = set()
    for module, others in graph.items():
        for other in others:
            (half, at), (half_there, there) = place(module), place(other)
            if half in PLACES and half == half_there and at != there and {at, there} <= set(PLACES[half]):
                found.add((at, there))
    return found


def place(module: str) -> tuple[str, str]:
    """evm_deploy.export.onnx.readme -> export, onnx."""
    _, half, at, *_ = [*module.split("."), "", ""]
    return half, at


def code(path, words: re.Pattern[str]) -> list[str]:
    """Names and strings in which `words` stand; docstrings and comments do not count."""
    source = path.read_text(encoding="utf-8")
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        f"{path.relative_to(PACKAGE)}:{token.start[0]} {token.string[:60]}"
        for token in tokens
        if token.type in (tokenize.NAME, tokenize.STRING)
        and token.start[0] not in documentation
        and words.search(token.string)
    ]


def test_every_folder_imports_what_the_table_says():
    assert set(map(folder, modules())) == set(MAY_IMPORT)
    assert broken(edges()) == []
    assert broken({"evm_deploy.bundle.x": {"evm_deploy.export.plan"}})
    assert broken({"evm_deploy.data.x": {"evm_deploy.demo"}})


def test_no_two_modules_import_each_other():
    assert cycles(edges()) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_imports_in_functions_and_for_types_count():
    source = "if TYPE_CHECKING:\n    from a.b import c\ndef f():\n    import a.d\n    from torch import nn\n"
    assert imports(source, {"a.b", "a.d", "a.b.c"}) == {"a.b.c", "a.d", "torch"}


def test_no_targets_folder_imports_anothers():
    assert beside(edges()) == set(BESIDE)
    assert beside({"evm_deploy.export.coreml.x": {"evm_deploy.export.onnx"}}) == {("coreml", "onnx")}


def test_the_run_half_imports_no_build():
    found = {
        (module, other)
        for module, others in edges().items()
        for other in others
        if folder(module) in ("bundle", "runtimes", "tasks", "data")
        and any(other == never or other.startswith(f"{never}.") for never in NEVER)
    }
    assert {module for module, _ in found if not module.startswith(EMULATOR)} == set()
    assert {other for _, other in found} == {"torch"}


@pytest.mark.parametrize(
    "module",
    [
        "evm_deploy.bundle.loaded",
        "evm_deploy.runtimes.registry",
        "evm_deploy.data.images",
        "evm_deploy.data.preprocessing",
        "evm_deploy.data.sources",
    ],
)
def test_apps_import_it_without_any_engine(module):
    heavy = ("torch", "onnx", "onnxruntime", "openvino", "coremltools", "tensorrt", "tensorrt_rtx")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({heavy})); "
    assert subprocess.run([sys.executable, "-c", f"{blocked}import {module}"], capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"{blocked}import torch"], capture_output=True).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(("words", "target"), WORDS.items(), ids=WORDS.values())
def test_the_words_of_a_target_stand_in_its_own_places(words, target):
    own = (f"export/{target}/", f"runtimes/{target}/", f"runtimes/{target}.py", *EXCEPTIONS)
    found = [each for path in modules().values() for each in code(path, re.compile(words, re.IGNORECASE))]
    assert [each for each in found if not each.startswith(own)] == []
    assert any(each.startswith(own[0]) for each in found)


def test_no_exception_is_there_for_nothing():
    every = re.compile("|".join(WORDS), re.IGNORECASE)
    for place in EXCEPTIONS:
        files = [path for path in modules().values() if path.relative_to(PACKAGE).as_posix().startswith(place)]
        assert any(code(path, every) for path in files), place


def test_the_blocks_of_one_family_are_named_where_they_are():
    found = [each for path in modules().values() for each in code(path, MODEL)]
    assert found and [each for each in found if not each.startswith(MODEL_PLACES)] == []
