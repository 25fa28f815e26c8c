"""Imports of Triton in a `try`: served to the code that cannot do without, and to no other."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

import evm_deploy
from evm_deploy.model.foreign.guarded import dispensable_imports

NONE = "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
FLAG = "HAS = True\ntry:\n    import triton\n    import triton.language as tl\nexcept:\n    HAS = False\n"
KERNEL = "@triton.jit\ndef kernel(x: tl.constexpr):\n    pass\n"
OWN = "try:\n    import triton\nexcept ImportError:\n    class triton:\n        jit = staticmethod(lambda f: f)\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import triton\n", set()),
        (NONE, {2}),
        (FLAG, {3, 4}),
        (FLAG + "def f():\n    return triton.cdiv(1, 2)\n", {3, 4}),  # used by a call only
        (FLAG + "if HAS:\n    @triton.jit\n    def kernel(): pass\n", {3, 4}),
        (FLAG + KERNEL, set()),  # VMamba: the flag is there, but the kernels are defined without asking it
        (NONE + "@triton.jit\ndef kernel(): pass\n", set()),
        (NONE + "class A:\n    @triton.jit\n    def kernel(self): pass\n", set()),
        (NONE + "SIZE = triton.cdiv(7, 2)\n", set()),
        (OWN + "@triton.jit\ndef kernel(): pass\n", {2}),
        ("try:\n    from .kernels import f\nexcept ImportError:\n    f = None\n", {2}),
        ("try:\n    from .kernels import f\nexcept ImportError:\n    from kernels import f\n", set()),
        ("try:\n    from .kernels import f\nexcept ImportError:\n    from .slow import f\n", {2}),
        ("try:\n    from kernels import (\n        f,\n        g,\n    )\nfinally:\n    pass\n", {2, 3, 4, 5}),
        ("def f(:\n", set()),
    ],
)
def test_the_imports_that_a_file_can_do_without(text, lines, tmp_path):
    file = tmp_path / "text.py"
    file.write_text(text)
    assert dispensable_imports(str(file)) == lines


def test_a_file_that_defines_kernels_after_a_failed_import_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "csm_kernels.py").write_text(
        FLAG + KERNEL + "def f(x):\n    return kernel[(1,)](x) if HAS > 1 else x\n"
    )
    (tmp_path / "csm_network.py").write_text(
        textwrap.dedent(
            """
            try:
                from .csm_kernels import f
            except:
                from csm_kernels import f
            """
        )
    )
    try:
        with evm_deploy.cpu_mamba():
            module = importlib.import_module("csm_network")
        assert module.f(3) == 3 and sys.modules["csm_kernels"].HAS
        assert "triton" not in sys.modules
    finally:
        for name in ("csm_network", "csm_kernels"):
            sys.modules.pop(name, None)
