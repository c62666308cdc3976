"""Sequences from an encoder-decoder, one token at a time: greedily, or by beam search."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NextLogits(Protocol):
    """Encodes the sources in its first call, and keeps what it gave for the next ones."""

    def __call__(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Logits of the next token, ``(rows, vocab_size)``, of decoder inputs ``(rows, length)`` for those sources."""


def beam_search(
    next_logits: NextLogits,
    num_sources: int,
    length: int,
    *,
    start: int,
    end: int,
    num_beams: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The likeliest sequence that is found for each source; with one beam, the likeliest token each time.

    Beams are compared by the mean log probability of their tokens, the end included. It never stops early: models whose
    parameters are gathered in each forward pass need the same number of passes on every rank.

    Args:
        next_logits: of the decoder.
        num_sources: how many sequences to make.
        length: most tokens of each, the end included.
        start: token that the decoder begins with.
        end: token that ends a sequence; all after it are the same.
        num_beams: sequences that are kept for each source.
        device: of the decoder's inputs.

    Returns:
        Tokens ``(num_sources, length)``, without the start.

    Raises:
        ValueError: no beam, or no token.
    """
    if num_beams < 1 or length < 1:
        raise ValueError(f"num_beams={num_beams} and length={length} must be at least 1")
    rows = torch.arange(num_sources, device=device).repeat_interleave(num_beams)
    first = torch.arange(num_sources, device=device)[:, None] * num_beams
    tokens = torch.full((len(rows), 1), start, device=device)
    # All beams of a source begin alike: only the first may be continued, so that they become different ones.
    scores = torch.full((num_sources, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    lengths = torch.zeros_like(scores)
    done = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(length):
        logits = next_logits(rows, tokens).float()
        logs = logits.log_softmax(-1).unflatten(0, (num_sources, num_beams))
        only_end = torch.full_like(logs[0, 0], -torch.inf)
        only_end[end] = 0.0
        logs = torch.where(done[..., None], only_end, logs)
        # What is done has its length; what goes on is one longer.
        longer = torch.where(done, lengths, lengths + 1)
        totals = scores[..., None] + logs
        means = (totals / longer[..., None].clamp(min=1)).flatten(1)
        _, best = means.topk(num_beams, dim=1)
        beam, token = best // logs.shape[-1], best % logs.shape[-1]
        scores, lengths = totals.flatten(1).gather(1, best), longer.gather(1, beam)
        done = done.gather(1, beam) | (token == end)
        tokens = torch.cat((tokens[(first + beam).flatten()], token.flatten()[:, None]), dim=1)
    return tokens.unflatten(0, (num_sources, num_beams))[:, 0, 1:]
