"""Visual Mambas of other people, unmodified: stand-ins for the compiled and Triton-backed names that they import.

>>> import evm_deploy
>>> with evm_deploy.cpu_mamba():
...     from their_package import their_model
>>> module = their_model()

Every Mamba-1 entry point ends in the op evm::selective_scan, every Mamba-2 entry point in standard ops.
"""

from evm_deploy.model.foreign.imports import cpu_mamba
from evm_deploy.model.foreign.running import foreign_code
from evm_deploy.model.foreign.stand_ins import register

__all__ = ["cpu_mamba", "foreign_code", "register"]
