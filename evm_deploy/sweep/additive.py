"""Additive model of a search: what each setting adds to the cost and to the accuracy, and the next choice by both.

Settings of an export act nearly independently of each other: a smaller input is faster in every precision. So a few
trials tell about all combinations. Each quantity is a linear regression on the settings with normal priors, whose
posterior is exact. The next choice is that of the largest expected improvement over the best figure within the budget,
times the probability that it fits the budget and does not fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evm_deploy.sweep.space import Choice, Space

Array = NDArray[np.float64]
LEAST = 0.02  # probability of not failing that a choice keeps


@dataclass(frozen=True)
class Outcome:
    """Outcome of a choice. shares: known costs by name, relative to their limits; None if the choice failed.

    figure: main figure, 0 to 1; None if it was not evaluated.
    """

    shares: Mapping[str, float] | None
    figure: float | None = None

    @property
    def excess(self) -> float:
        """Excess of the worst known cost over its limit, relative to it; negative below it."""
        return max((self.shares or {}).values(), default=1.0) - 1


@dataclass(frozen=True)
class Prior:
    """Prior of a quantity. mean, level: of its mean over all choices. effect, noise: standard deviations."""

    mean: float
    level: float
    effect: float
    noise: float


COST = Prior(0.0, 2.0, 0.5, 0.1)  # logarithm of a cost relative to its limit: a setting changes it by 1.6x
FIGURE = Prior(0.5, 0.5, 0.2, 0.01)
SUCCESS = Prior(1.0, 0.1, 0.3, 0.2)


class Additive:
    """Model of the choices of a space, and the outcomes that it has learned."""

    def __init__(self, space: Space) -> None:
        values = sorted({item for each in space.all() for item in each.settings.items()})
        self._columns = {item: place for place, item in enumerate(values, 1)}
        self._learned: dict[Choice, Outcome] = {}

    def learn(self, choice: Choice, outcome: Outcome) -> None:
        """Add the outcome of a choice."""
        self._learned[choice] = outcome

    def best(self, rest: Sequence[Choice]) -> Choice:
        """Return the most promising of these choices."""
        wanted = self._features(rest)
        known = {choice: each for choice, each in self._learned.items() if each.shares is not None}
        figures = {choice: each.figure for choice, each in known.items() if each.figure is not None}
        figure, deviation = self._posterior(wanted, figures, FIGURE)
        within = [each.figure or 0.0 for each in known.values() if each.excess <= 0]
        gain = (figure - max(within, default=0.0)) / deviation
        score = deviation * (gain * _below(gain) + np.exp(-(gain**2) / 2) / math.sqrt(2 * math.pi))
        for name in sorted({name for each in known.values() for name in each.shares or {}}):
            costs = {
                choice: math.log(max(each.shares[name], 1e-6))
                for choice, each in known.items()
                if each.shares and name in each.shares
            }
            cost, deviation = self._posterior(wanted, costs, COST)
            score = score * _below(-cost / deviation)
        done, _ = self._posterior(wanted, {choice: float(choice in known) for choice in self._learned}, SUCCESS)
        return rest[int(np.argmax(score * np.clip(done, LEAST, 1.0)))]

    def _features(self, choices: Sequence[Choice]) -> Array:
        """Return (choices, 1 + values): a one for the level, and a one for each setting."""
        found = np.zeros((len(choices), 1 + len(self._columns)))
        found[:, 0] = 1
        for row, each in zip(found, choices, strict=True):
            for item in each.settings.items():
                row[self._columns[item]] = 1
        return found

    def _posterior(self, wanted: Array, known: dict[Choice, float], prior: Prior) -> tuple[Array, Array]:
        """Return mean and standard deviation of a quantity for the wanted features, noise included."""
        seen = self._features(list(known))
        spread = np.full(wanted.shape[1], prior.effect**-2)
        spread[0] = prior.level**-2
        inverse = np.linalg.inv(np.diag(spread) + seen.T @ seen / prior.noise**2)
        weights = inverse @ seen.T @ (np.array(list(known.values())) - prior.mean) / prior.noise**2
        variance = np.einsum("ij,jk,ik->i", wanted, inverse, wanted)
        return prior.mean + wanted @ weights, np.sqrt(variance + prior.noise**2)


def _below(values: Array) -> Array:
    """Return the standard normal distribution function."""
    return np.array([math.erfc(-each / math.sqrt(2)) / 2 for each in values])
