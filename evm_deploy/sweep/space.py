"""Space of a search: all settings that evm-tune may choose for an artifact, without loading a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evm_deploy.export.plan import CALIBRATED

METHODS = ("mse", "minmax", "percentile", "entropy")
SMOOTHINGS = ("on", "off")

Pick = Callable[[str, Sequence[str]], str]  # name of a setting, its possible values -> the value


@dataclass(frozen=True)
class Choice:
    """Settings of one candidate, as texts.

    form: `target:precision`. imgsz: `HxW`. threads: of an inference. calib_method, smooth: as in ExportPlan, empty for
    forms that are not calibrated.
    """

    form: str
    imgsz: str
    threads: str
    calib_method: str = ""
    smooth: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """Settings by name, without those that the form does not have."""
        return {name: value for name, value in vars(self).items() if value}

    @property
    def target(self) -> str:
        """Target of the form."""
        return self.form.partition(":")[0]

    @property
    def precision(self) -> str:
        """Precision of the form."""
        return self.form.partition(":")[2]

    def __str__(self) -> str:
        calibrated = f", {self.calib_method}, smooth {self.smooth}" if self.calib_method else ""
        return f"{self.form.replace(':', ' ')}{calibrated}, {self.imgsz}, threads {self.threads}"


@dataclass(frozen=True)
class Space:
    """Possible values of each setting, the one to begin with first. threads: the most first."""

    forms: tuple[str, ...]
    sizes: tuple[str, ...]
    threads: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    smoothings: tuple[str, ...] = SMOOTHINGS

    def draw(self, pick: Pick) -> Choice:
        """Return the choice whose settings `pick` picks, one after the other."""
        form = pick("form", self.forms)
        imgsz, threads = pick("imgsz", self.sizes), pick("threads", self.threads)
        if form.partition(":")[2] not in CALIBRATED:
            return Choice(form, imgsz, threads)
        return Choice(form, imgsz, threads, pick("calib_method", self.methods), pick("smooth", self.smoothings))

    def all(self) -> list[Choice]:
        """Return every choice, once."""
        names = ("form", "imgsz", "threads", "calib_method", "smooth")
        every = itertools.product(self.forms, self.sizes, self.threads, self.methods, self.smoothings)
        settings = (dict(zip(names, values, strict=True)) for values in every)
        return list(dict.fromkeys(self.draw(lambda name, _, given=each: given[name]) for each in settings))  # type: ignore[misc]

    def starts(self) -> list[Choice]:
        """Return the choices that a search begins with: each form, everything else at its first value."""
        return [self.draw(lambda name, values, form=form: form if name == "form" else values[0]) for form in self.forms]  # type: ignore[misc]

    def as_dict(self) -> dict[str, list[str]]:
        """Return plain data."""
        return {name: list(values) for name, values in vars(self).items()}
