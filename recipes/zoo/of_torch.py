"""Networks of what torch.nn has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

WIDTH, DEPTH = 32, 4


class OfTokens(nn.Module):
    """A part of torch.nn between an embedding and a head.

    Args:
        kind: ``"TransformerEncoder"``, ``"TransformerDecoder"``, ``"LSTM"``, ``"Conv1d"`` or
            ``"MultiLayerPerceptron"``.
        num_words: to read and to predict.
    """

    def __init__(self, kind: str, num_words: int) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.head = nn.Embedding(num_words, WIDTH), nn.Linear(WIDTH, num_words)
        self.body = _body(kind)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length, words)`` of tokens ``(batch, length)``."""
        x = self.embedding(tokens)
        if self.kind == "TransformerDecoder":
            x = self.body(x, x.flip(1))
        elif self.kind == "LSTM":
            x = self.body(x)[0]
        elif self.kind == "Conv1d":
            x = self.body(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.body(x)
        return self.head(x)


def _body(kind: str) -> Any:
    if kind == "TransformerEncoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, batch_first=True), DEPTH)
    if kind == "TransformerDecoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, batch_first=True), DEPTH)
    if kind == "LSTM":
        return nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
    if kind == "Conv1d":
        return nn.Sequential(*(nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()) for _ in range(DEPTH)))
    layers = (nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(DEPTH))
    return nn.Sequential(*layers)
