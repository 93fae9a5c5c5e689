"""Stops when the answer is certain: is a mean above a limit or below it, asked after every observation.

A bettor starts with 1 and bets on each observation's distance to the limit. Where the true mean is the limit, nobody's
wealth ever grows past 1 / alpha except with probability alpha (Ville, 1939), so looking after every episode costs no
certainty. Wealth is averaged over many bettors, since the best bet is not known beforehand (Waudby-Smith and Ramdas,
2024, arXiv:2010.09686).
"""

from __future__ import annotations

import math
from enum import Enum

import numpy as np

BETTORS = 60


class Answer(Enum):
    """Where the mean is."""

    ABOVE = "above"
    BELOW = "below"


class SequentialMean:
    """Watches observations between 0 and 1.

    Args:
        limit: the mean is asked to be above or below it; strictly between 0 and 1.
        confidence: that an answer, whenever it comes, is right.

    Attributes:
        n: observations. total: their sum.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, limit: float, confidence: float = 0.95):
        if not 0.0 < limit < 1.0 or not 0.0 < confidence < 1.0:
            raise ValueError(f"limit {limit} and confidence {confidence} have to lie between 0 and 1")
        self.limit, self.n, self.total = limit, 0, 0.0
        # Either side may err with half of what is allowed.
        self._needed = math.log(2.0 / (1.0 - confidence))
        share = (np.arange(BETTORS) + 0.5) / BETTORS
        self._bets = {Answer.ABOVE: share / limit, Answer.BELOW: -share / (1.0 - limit)}
        self._wealth = {side: np.zeros(BETTORS) for side in Answer}

    def add(self, value: float) -> Answer | None:
        """One more observation; the answer once it is certain.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"observation {value} is not between 0 and 1")
        self.n, self.total = self.n + 1, self.total + float(value)
        for side, bets in self._bets.items():
            self._wealth[side] += np.log1p(bets * (value - self.limit))
        return self.answer

    @property
    def answer(self) -> Answer | None:
        """None while both are possible."""
        for side, wealth in self._wealth.items():
            top = float(wealth.max())
            if top + math.log(float(np.exp(wealth - top).mean())) >= self._needed:
                return side
        return None
