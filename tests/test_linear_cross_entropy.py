"""Linear cross entropy in pieces: the laws of the table again with a budget of few scores, and what they do not reach.

The oracle is cross entropy of the scores in one piece: torch's own in pieces has no second derivative (it gives zero),
nor smoothing, nor class probabilities.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph import MOVES_OR_ADDS, nodes
from test_laws import DISTRIBUTED, verified
from torch import Tensor
from torch.testing import assert_close

from manualgrad import nn
from manualgrad.ops import linear_cross_entropy as area
from manualgrad.registry import Maker, ops
from manualgrad.saving import kept_bytes
from manualgrad.verification import LAWS

ours: Any = nn.functional.linear_cross_entropy
OP = ops()["linear_cross_entropy"]


@pytest.fixture(autouse=True)
def few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(area, "_PIECE", 5)


def plain(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **how: Any) -> Tensor:
    how.pop("options", None)
    scores = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    return F.cross_entropy(scores.reshape(*input.shape[:-1], *linear_weight.shape[:-1]), target, **how)


@pytest.mark.parametrize("law", [law for law in LAWS if law != DISTRIBUTED])
@pytest.mark.parametrize("which", range(len(list(OP.samples(Maker())))))
def test_law_in_pieces(law: str, which: int, device: str) -> None:
    verified(OP, which, device, law).raise_if_failed()
