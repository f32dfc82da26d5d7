"""The model's loss with its blocks compiled: all blocks are alike, so the graph of one serves them all (of two,
where every second one has a value embedding).

Compiling the model as one graph unrolls its layers: many times the seconds, again for each micro-batch size. What stays outside
the blocks is one operation to the compiler anyway (the loss on a GPU).
"""

import torch
from torch import Tensor

from nanochat.model.gpt import GPT, Block
from nanochat.model.kernels import norm


class CompiledLoss:
    """Called as the model is, with targets: (tokens, targets, reduction) -> loss. The model itself stays as it was.

    One compilation for each shape of `tokens`, with and without gradients.

    A graph ends with what a block's MLP adds to the stream still apart from it: the next one's norm reads the sum anyway, so
    adding there saves a pass over the stream (measured on an H100, 12 layers x 768: 1% of a training step).
    """

    def __init__(self, model: GPT):
        self.model = model
        self._first, self._next, self._last = (torch.compile(part, dynamic=False) for part in (_first, _next, _last))

    def __call__(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        cos, sin = self.model.angles(tokens.size(1))
        x, change = self._first(self.model, tokens, cos, sin)
        for block in self.model.blocks[1:]:
            x, change = self._next(block, x, change, tokens, cos, sin)
        return self.model.loss(self._last(x, change), targets, reduction)


def _first(model: GPT, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return model.blocks[0].deferred(model.embedded(tokens), tokens, cos, sin)


def _next(block: Block, x: Tensor, change: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return block.deferred(x + change, tokens, cos, sin)


def _last(x: Tensor, change: Tensor) -> Tensor:
    return norm(x + change)
