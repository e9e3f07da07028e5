"""KVCache: keys and values of every layer, allocated once for the longest sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from snugpt.spec.shape import ModelShape


class KVCache:
    """Static storage for `batch` sequences of up to `max_len` tokens.

    2 x layers x batch x max_len x kv_dim elements, whatever is in use; `length` tokens are.
    """

    def __init__(
        self,
        shape: ModelShape,
        batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        sizes = (shape.num_layers, batch, max_len, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.empty(sizes, dtype=dtype, device=device)
        self.values = torch.empty(sizes, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Store the new (B, T, K, D) behind what is held; return all that these tokens may see.

        One new token sees only its window, which is cut here; several need the window's mask.
        """
        end = self.length + k.shape[1]
        self.keys[layer][:, self.length : end] = k
        self.values[layer][:, self.length : end] = v
        first = max(0, end - window) if window and k.shape[1] == 1 else 0
        return self.keys[layer][:, first:end], self.values[layer][:, first:end]
