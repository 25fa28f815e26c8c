"""Making a network from a user's own code: `package.module:factory` or `file.py:factory`. The code is run."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evm_deploy.errors import CheckpointError, EvmError, UsageError
from evm_deploy.model.checkpoint_file import read_content
from evm_deploy.model.foreign.imports import cpu_mamba
from evm_deploy.model.foreign.look import reason
from evm_deploy.model.network import Network
from evm_deploy.model.state_dict import drop_beside, take_weights
from evm_deploy.model.weight_sets import some

FORMS = "use package.module:factory, or file.py:factory"


def network_of(
    where: str,
    weights: Path | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
    task: str = "raw",
    imgsz: tuple[int, int] = (224, 224),
    channels: int = 3,
) -> Network:
    """Import a factory within `cpu_mamba`, call it with `arguments`, load the weights, and return the network.

    where: `package.module:name` below the working directory or installed, or `file.py:name`. name: a function, a class
    or a module. weights: a file with a state dict whose keys are exactly the module's; None keeps the factory's own.
    imgsz, channels: (H, W) and channels of the input that the network is run on once.
    Raises UsageError for what cannot be imported, called or exported, CheckpointError for weights that do not fit.
    """
    module = _made(where, dict(arguments or {}))
    notes = [f"made by {where}"] if weights else [f"made by {where}, with its own weights: no file was given"]
    checkpoint = _load(module, weights) if weights else {}
    name = where.rpartition(":")[2].lower()
    network = Network.of(module, torch.rand(1, channels, *imgsz), outputs=outputs, task=task, name=name, notes=notes)
    return network._replace(spec=replace(network.spec, checkpoint={**network.spec.checkpoint, **checkpoint}))


def model_arguments(text: str) -> dict[str, Any]:
    """Parse `name=value, name=value`, values being Python literals. Raises UsageError."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise UsageError(
            f"--model-arg {text!r} cannot be read", "use name=value, values as in Python: depths=[2,2],name='tiny'"
        ) from error


def _made(where: str, arguments: dict[str, Any]) -> nn.Module:
    place, _, name = where.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"--model {where!r} names no factory", FORMS)
    file = Path(place)
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise UsageError(f"--model {where}: the file {file} does not exist", FORMS)
    sys.path.insert(0, str(file.resolve().parent if is_file else Path.cwd()))
    try:
        with cpu_mamba():
            found = importlib.import_module(file.stem if is_file else place)
            if not hasattr(found, name):
                raise UsageError(f"--model {where}: {found.__name__} has no {name}", FORMS)
            value = getattr(found, name)
            module = value if isinstance(value, nn.Module) else _called(value, where, arguments)
    except EvmError:
        raise
    except ImportError as error:
        hint = "install the package that is missing, or start in the folder that holds the module"
        raise UsageError(f"--model {where} cannot be imported: {reason(error)}", hint) from error
    except Exception as error:  # code of others
        raise UsageError(f"--model {where} fails: {reason(error)}", "mend it, or see --model-arg") from error
    finally:
        del sys.path[0]
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model {where} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def _called(factory: Any, where: str, arguments: dict[str, Any]) -> Any:
    if not callable(factory):
        raise UsageError(f"--model {where} is a {type(factory).__name__}, not a function, class or module")
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"--model {where}{inspect.signature(factory)} cannot be called with {arguments or 'no arguments'}: {error}",
            "give --model-arg name=value",
        ) from error
    return factory(**arguments)


def _load(module: nn.Module, path: Path) -> dict[str, Any]:
    """Load a state dict into a module, strictly. Returns the facts for ModelSpec.checkpoint."""
    own = module.state_dict()
    anchor = max(own, key=lambda name: (name.count("."), len(name)))  # a name that other tensors hardly have
    raw = take_weights(read_content(path), [anchor])
    if raw is None:
        raise CheckpointError(
            f"checkpoint {path} does not fit {type(module).__name__}: no tensor of it is named {anchor}",
            "give the weights of this network, or the factory's arguments: --model-arg",
        )
    drop_beside(raw, own)
    shapes = {name: list(value.shape) for name, value in raw.tensors.items()}
    wrong = [
        *(f"missing {name}" for name in sorted(own.keys() - shapes.keys())),
        *(f"unexpected {name}" for name in sorted(shapes.keys() - own.keys())),
        *(
            f"{name} is {shapes[name]}, expected {list(own[name].shape)}"
            for name in sorted(own.keys() & shapes.keys())
            if shapes[name] != list(own[name].shape)
        ),
    ]
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} does not fit {type(module).__name__}: {some(wrong)}",
            "give the factory the arguments that it was trained with: --model-arg",
        )
    module.load_state_dict(raw.tensors)
    return raw.facts()
