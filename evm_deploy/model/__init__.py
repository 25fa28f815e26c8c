"""Networks and the loading of their checkpoints: the common types, and one folder for each family.

>>> from evm_deploy.model import Network
"""

from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network

__all__ = ["Family", "LoadOptions", "ModelSpec", "Network"]
