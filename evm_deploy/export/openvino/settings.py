"""Settings of an OpenVINO export."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy._util.settings import Settings, setting

#: Kernels whose blocks multiply in half precision -> this precision.
HALF_KERNELS = {"avx512bf16": "bfloat16", "fp16": "float16", "i8mm": "float16"}


@dataclass(frozen=True)
class OpenVinoExportSettings(Settings):
    """Settings of an OpenVINO export.

    half_blocks: let blocks on the native kernel multiply in the half precision of the CPU (`HALF_KERNELS`), float16
    exports alone. CPUs without such a kernel compute these blocks in float32.
    """

    half_blocks: bool = setting(
        False,
        "--half-blocks",
        help="OpenVINO, with --fp16: let blocks on the native kernel multiply bfloat16 on CPUs with AVX512_BF16, or "
        "float16 on Arm CPUs with FP16 arithmetic; exports on such a CPU, which verifies them",
    )
