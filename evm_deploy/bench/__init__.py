"""Latency on the device itself: measured until it is stable, with what is needed to compare two numbers.

Calling this package is calling `measuring.bench`.
"""

from evm_deploy.callable_package import make_callable

make_callable(__name__, "measuring", "bench")
