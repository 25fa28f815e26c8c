"""The settings of their own that targets have: flags of evm-export, listed here so that --help loads no target."""

from __future__ import annotations

from evm_deploy.export.tensorrt.settings import EngineSettings

KINDS: tuple[type, ...] = (EngineSettings,)
