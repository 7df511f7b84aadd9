"""What a text model says after texts that grow: each position is computed once for as long as a text fits the window.

Legend: B texts, T positions, R positions to be read, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distcond.deploy.load import Deployed
from distcond.nn.transformer import Memory, Transformer


class Reader:
    """Answers to texts that only grow. Of a text longer than the model's context its last positions are computed anew each time.

    That has to be so: with the first position of a window goes what all others have seen of it. Models other than the
    transformer have no keys and values to keep; they are computed anew, too.
    """

    def __init__(self, model: Deployed, texts: Sequence[Sequence[int]], max_new: int) -> None:
        self._model = model
        self._num_read = [0 for _ in texts]
        longest = max(map(len, texts), default=0) + max_new
        self._memory = Memory(len(texts), min(longest, model.shape.max_length))

    def read(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Logits of what follows each text, fp32 [B, C], and the steps that its last position took."""
        body, most = self._model.body, self._model.shape.max_length
        is_kept = [isinstance(body, Transformer) and len(text) <= most for text in texts]
        logits = torch.empty(len(texts), self._model.shape.output_size)
        steps = torch.empty(len(texts), dtype=torch.int64)
        for rows, read in (
            ([row for row, kept in enumerate(is_kept) if kept], self._read_on),
            ([row for row, kept in enumerate(is_kept) if not kept], self._read_anew),
        ):
            if rows:
                logits[rows], steps[rows] = read(texts, rows)
        return logits, steps.tolist()

    def _read_on(self, texts: Sequence[Sequence[int]], rows: list[int]) -> tuple[Tensor, Tensor]:
        body, length = self._model.body, self._memory.shape[1]
        assert isinstance(body, Transformer)
        places = [row * length + place for row in rows for place in range(self._num_read[row], len(texts[row]))]
        ids = [one for row in rows for one in texts[row][self._num_read[row] :]]
        last = torch.tensor([len(texts[row]) - self._num_read[row] for row in rows]).cumsum(0) - 1
        for row in rows:
            self._num_read[row] = len(texts[row])
        logits, stats = body.read_on(torch.tensor(ids), torch.tensor(places), self._memory)
        return logits[last].float(), stats.steps[last]

    def _read_anew(self, texts: Sequence[Sequence[int]], rows: list[int]) -> tuple[Tensor, Tensor]:
        # Positions see only those before them, so that shorter windows are padded at their end.
        windows = [torch.tensor(texts[row][-self._model.shape.max_length :]) for row in rows]
        lengths = torch.tensor([len(window) for window in windows])
        logits, stats = self._model(torch.nn.utils.rnn.pad_sequence(windows, batch_first=True), lengths)
        every = torch.arange(len(rows))
        return logits[every, lengths - 1], stats.steps.view(logits.shape[:2])[every, lengths - 1]
