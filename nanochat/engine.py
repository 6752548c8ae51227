"""Sampling text from a model, one token at a time with a key-value cache."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of the tokens seen so far, per layer (B, length, K, D); K kv heads, D head dim."""

    def __init__(self, n_layer: int):
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * n_layer

    @property
    def length(self) -> int:
        last = self._layers[-1]  # appended to last, so that the length stays the same during a forward pass
        return 0 if last is None else last[0].size(1)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k, v (B, T, K, D); returns all keys and values of the layer."""
        old = self._layers[layer]
        self._layers[layer] = (k, v) if old is None else (torch.cat((old[0], k), 1), torch.cat((old[1], v), 1))
        return self._layers[layer]


@torch.no_grad()
def generate(
    model,
    tokens: list[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Sample up to `max_tokens` tokens after `tokens`, ending early at `stop` or at the model's sequence length.

    Returns the new tokens, without `stop`. Temperature 0 is greedy. Raises ValueError for an empty prompt or a
    negative temperature.
    """
    if not tokens or temperature < 0:
        raise ValueError("generate needs at least one token and a temperature >= 0")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    cache, out = KVCache(model.config.n_layer), []
    step = torch.tensor([tokens], device=model.device)
    for _ in range(min(max_tokens, model.config.sequence_len - len(tokens))):
        logits = model(step, kv_cache=cache)[0, -1]  # (V,)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k is not None and top_k < logits.numel():
                logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == stop:
            break
        out.append(token)
        step = torch.tensor([[token]], device=model.device)
    return out
