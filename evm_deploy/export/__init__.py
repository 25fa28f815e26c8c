"""From a checkpoint to a verified bundle. Calling this package is calling `pipeline.export`."""

from evm_deploy.callable_package import make_callable

make_callable(__name__, "pipeline", "export")
