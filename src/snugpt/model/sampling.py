"""From logits to tokens: temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snugpt.errors import bad_value

GREEDY_BELOW = 1e-6  # a temperature this low divides logits into infinities


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; None switches a cut off."""

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    seed: int = 1337

    def __post_init__(self) -> None:
        hint = "snugpt generate NAME --temperature 0.8"
        if not 0.0 <= self.temperature <= 100.0:  # also refuses NaN
            raise bad_value("temperature", self.temperature, "0 to 100", hint=hint)
        if self.top_k is not None and self.top_k < 1:
            raise bad_value("top_k", self.top_k, "at least 1", hint=hint)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise bad_value("top_p", self.top_p, "above 0, up to 1", hint=hint)
        if not 0 <= self.seed < 2**63:
            raise bad_value("seed", self.seed, "0 to 2**63 - 1", hint=hint)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token per row: (B, V) fp32, overwritten -> (B, 1) int64."""
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1, keepdim=True)
    logits.div_(sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k).values[:, -1:]  # (B, 1)
        logits.masked_fill_(logits < lowest, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        cut_tail(logits, sampling.top_p)
    probabilities = logits.softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def cut_tail(logits: Tensor, top_p: float) -> None:
    """Keep the fewest tokens whose probabilities reach `top_p` together (arXiv 1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1).sub_(probabilities)  # of all likelier tokens
    ordered.masked_fill_(before >= top_p, -torch.inf)
    logits.scatter_(-1, order, ordered)
