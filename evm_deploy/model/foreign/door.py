"""Making a network from a user's own code and a file of weights. The code is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evm_deploy.errors import CheckpointError
from evm_deploy.model.checkpoint_file import read_content
from evm_deploy.model.factory import Factory
from evm_deploy.model.foreign.own_code import made
from evm_deploy.model.foreign.saved import saved_in
from evm_deploy.model.network import Network
from evm_deploy.model.state_dict import drop_beside, take_weights
from evm_deploy.model.weight_sets import some


def network_of(factory: Factory) -> Network:
    """Import a factory within `cpu_mamba`, call it, load the weights, and return the network. See `Factory`."""
    module = made(factory).eval()
    notes = [f"made by {factory.where}" + ("" if factory.weights else ", with its own weights: no file was given")]
    checkpoint = load_weights(module, Path(factory.weights)) if factory.weights else {}
    channels = factory.channels or saved_in(module).channels
    network = Network.of(
        module,
        torch.rand(1, channels, *factory.imgsz) if factory.imgsz else None,
        outputs=factory.outputs,
        task=factory.task,
        name=factory.name.lower(),
        notes=notes,
        run=True,
        channels=channels,
    )
    return network._replace(spec=replace(network.spec, checkpoint={**network.spec.checkpoint, **checkpoint}))


def load_weights(module: nn.Module, path: Path) -> dict[str, Any]:
    """Load a state dict into a module, strictly. Returns the facts for ModelSpec.checkpoint. Raises CheckpointError."""
    own = module.state_dict()
    anchor = max(own, key=lambda name: (name.count("."), len(name)), default="")  # other tensors hardly have this name
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
