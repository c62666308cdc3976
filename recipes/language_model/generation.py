"""Text, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompt: Tensor,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    context_length: int | None = None,
) -> Tensor:
    """A prompt with ``num_tokens`` more, each drawn given all (or the last ``context_length``) before it.

    The whole context is computed anew for each token, so any causal model will do. It never stops early: models
    whose parameters are gathered in each forward pass need the same number of passes on every rank.

    Args:
        next_logits: tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``.
        prompt: ``(batch, length)``, at least one token.
        num_tokens: how many to add.
        temperature: divides the logits; 0 takes the likeliest token.
        context_length: most tokens that the model is shown.

    Returns:
        ``(batch, length + num_tokens)``.

    Raises:
        ValueError: a negative temperature or an empty prompt.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; pass 0 for the likeliest token, or more")
    if prompt.shape[1] == 0:
        raise ValueError("the prompt has no token; begin with the end of text")
    tokens = prompt
    for _ in range(num_tokens):
        shown = tokens if context_length is None else tokens[:, -context_length:]
        logits = next_logits(shown)[:, -1].float()
        if temperature == 0:
            following = logits.argmax(dim=-1, keepdim=True)
        else:
            following = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
        tokens = torch.cat((tokens, following), dim=1)
    return tokens
