"""Networks and how they are loaded: the seam (Network, ModelSpec, Family) and one folder a family.

>>> from evm_deploy.model import Network
"""

from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network

__all__ = ["Family", "LoadOptions", "ModelSpec", "Network"]
