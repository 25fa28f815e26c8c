"""The description of a network that a user's own code makes: plain data, of which any process can make the network."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evm_deploy.errors import UsageError

FORMS = "use package.module:factory, file.py:factory, or timm:NAME"
TIMM = "timm"


@dataclass(frozen=True)
class Factory:
    """A call of a user's code that gives a network, and the file with its weights. `foreign.door` makes the network.

    where: `package.module:name` below the working directory or installed, `file.py:name`, or `timm:name`. name: a
    function, a class or a module; with timm, the name of a model. weights: a file with a state dict whose keys are
    exactly the module's; None keeps the factory's own. arguments: of the factory. outputs: names of the outputs, in
    order. imgsz: (H, W); None takes the module's own, else 224. channels: of the input; None takes the module's own,
    else 3. Raises UsageError for a `where` of another form, and for a file that does not exist.
    """

    where: str
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] | None = None
    task: str = "raw"
    imgsz: tuple[int, int] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        named = self.name and not set("/:\\") & set(self.name) if self.place == TIMM else self.name.isidentifier()
        if not self.place or not named:
            raise UsageError(f"--model {self.where!r} names no factory", FORMS)
        if self.file and not self.file.is_file():
            raise UsageError(f"--model {self.where}: the file {self.file} does not exist", FORMS)
        if self.place == TIMM and "pretrained" in self.arguments:
            raise UsageError(
                "--model-arg pretrained: nothing is downloaded", "give the file with the weights in the place of CKPT"
            )

    @property
    def place(self) -> str:
        """Path of the file, dotted name of the module, or `timm`."""
        timm = self.where.startswith(f"{TIMM}:")
        return self.where.partition(":")[0] if timm else self.where.rpartition(":")[0]

    @property
    def name(self) -> str:
        """Name of the factory within its place."""
        return self.where.removeprefix(f"{self.place}:")

    @property
    def file(self) -> Path | None:
        """File that holds the factory, if `where` names one."""
        return Path(self.place) if self.place.endswith(".py") else None


def model_arguments(text: str) -> dict[str, Any]:
    """Parse `name=value, name=value`, values being Python literals. Raises UsageError."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args and all(keyword.arg for keyword in call.keywords)
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise UsageError(
            f"--model-arg {text!r} cannot be read", "use name=value, values as in Python: depths=[2,2],name='tiny'"
        ) from error
