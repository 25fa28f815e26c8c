"""Settings of context binaries for Qualcomm's NPU."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy._util.settings import Settings, setting, whole
from evm_deploy.errors import UsageError

#: Number of a SoC in Qualcomm's SDK -> version of its NPU (HTP architecture), and its name.
SOCS = {43: (73, "SM8550"), 57: (75, "SM8650"), 69: (79, "SM8750")}


@dataclass(frozen=True)
class QnnSettings(Settings):
    """Settings of a context binary.

    soc: number of the SoC in Qualcomm's SDK. htp_arch: version of its NPU; None for a SoC of SOCS. Raises UsageError
    for a number without a version.
    """

    soc: int = setting(
        57,
        "--soc",
        metavar="N",
        read=whole,
        help="Qualcomm NPU: number of the SoC in Qualcomm's SDK: 43 SM8550, 57 SM8650 (default), 69 SM8750, or another "
        "with --htp-arch",
    )
    htp_arch: int | None = setting(
        None, "--htp-arch", metavar="N", read=whole, help="Qualcomm NPU: version of the NPU of another SoC, such as 75"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.soc < 1 or (self.htp_arch is not None and self.htp_arch < 1):
            raise UsageError(f"--soc {self.soc} --htp-arch {self.htp_arch}: use numbers from 1")
        if self.soc in SOCS and self.htp_arch not in (None, SOCS[self.soc][0]):
            raise UsageError(f"--htp-arch {self.htp_arch}: SoC {self.soc} has version {SOCS[self.soc][0]}")
        if self.soc not in SOCS and self.htp_arch is None:
            known = ", ".join(f"{number} ({name})" for number, (_, name) in SOCS.items())
            raise UsageError(
                f"--soc {self.soc} is unknown; known: {known}", "add --htp-arch with the version of its NPU"
            )

    @property
    def architecture(self) -> int:
        """Version of the NPU."""
        return self.htp_arch or SOCS[self.soc][0]

    @property
    def name(self) -> str:
        """Name of the SoC; its number if the name is not known."""
        return SOCS[self.soc][1] if self.soc in SOCS else f"SoC {self.soc}"

    @property
    def options(self) -> dict[str, str]:
        """Options of the QNN plugin for this SoC, in float16."""
        return {
            "soc_model": str(self.soc),
            "htp_arch": str(self.architecture),
            "enable_htp_fp16_precision": "1",
            "offload_graph_io_quantization": "0",
        }
