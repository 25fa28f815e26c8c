"""Settings classes of single targets, which become flags of evm-export. Listed here so that --help loads no target."""

from __future__ import annotations

from evm_deploy.export.coreml.settings import CoreMlSettings
from evm_deploy.export.openvino.settings import OpenVinoExportSettings
from evm_deploy.export.qnn.settings import QnnSettings
from evm_deploy.export.tensorrt.settings import EngineSettings

KINDS: tuple[type, ...] = (CoreMlSettings, EngineSettings, OpenVinoExportSettings, QnnSettings)
