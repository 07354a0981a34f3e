"""How finished hypotheses are compared: rules for their length and for the source they cover.

Shapes: E hypotheses, S source positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LengthRule = Literal["wu", "average", "reward"]
CoverageRule = Literal["wu", "summary"]


def length_score(log_prob: float, length: int, rule: LengthRule, strength: float) -> float:
    """A log-probability as it is compared with those of other lengths.

    - ``wu``: divided by ((5 + length) / 6) ** strength. Source: Wu et al. 2016 (arXiv 1609.08144),
      equation 14, as Vaswani et al. 2017 use it.
    - ``average``: divided by length ** strength; the mean of the pieces at 1. Source: Jean et al.
      2015.
    - ``reward``: plus strength * length. Source: He et al. 2016, "Improved neural machine
      translation with SMT features".

    None of them falls with the length where the log-probability stays the same (and is at most 0).

    Args:
        length: pieces, EOS included.
        strength: not negative; 0 compares plain log-probabilities.
    """
    if rule == "reward":
        return log_prob + strength * length
    base = (5 + length) / 6 if rule == "wu" else length
    return log_prob / float(base**strength)


def coverage_score(
    coverage_ES: Tensor, keep_ES: Tensor, rule: CoverageRule, strength: float
) -> Tensor:
    """What scores gain by how hypotheses attended to the source, [E]; at most 0.

    - ``wu``: strength * sum_s log(min(coverage_s, 1)): against positions that are left out.
      Source: Wu et al. 2016, equation 14.
    - ``summary``: -strength * sum_s (max(coverage_s, 1) - 1): against positions that are repeated.
      Source: Gehrmann et al. 2018 (arXiv 1808.10792), section 4.

    Args:
        coverage_ES: attention to each source position, summed over the pieces, EOS included.
        keep_ES: false where the source is padding.
    """
    if rule == "wu":
        smallest = torch.finfo(torch.float32).tiny
        terms_ES = coverage_ES.clamp(smallest, 1.0).log()
    else:
        terms_ES = 1.0 - coverage_ES.clamp_min(1.0)
    return strength * terms_ES.masked_fill(~keep_ES, 0.0).sum(1)
