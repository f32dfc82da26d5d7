"""The model's loss with its blocks compiled: all blocks are alike, so the graph of one serves them all (of up to four kinds,
where some have a value embedding or a window).

Compiling the model as one graph unrolls its layers: many times the seconds, again for each micro-batch size. What stays outside
the blocks is one operation to the compiler anyway (the loss on a GPU).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nanochat.model.gpt import GPT, Block
from nanochat.model.kernels import norm, window_blocks

RECOMPILE_LIMIT = 64


class CompiledLoss:
    """Called as the model is, with targets: (tokens, targets, reduction) -> loss. The model itself stays as it was.

    One compilation for each shape of `tokens`: a validation runs the graphs of training. Graphs without gradients would take
    9 s more to compile (1.7 s from a filled cache; 12 layers x 768 on an H100), in every training and every probe of a batch size.

    A graph ends with what a block's MLP adds to the stream still apart from it: the next one's norm reads the sum anyway, so
    adding there saves a pass over the stream (measured on an H100, 12 layers x 768: 1% of a training step).
    """

    def __init__(self, model: GPT):
        self.model = model
        # Beyond torch's limit of 8 it would not compile: four kinds of blocks reach that with two shapes.
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        self._first, self._next, self._last = (torch.compile(part, dynamic=False) for part in (_first, _next, _last))

    def __call__(self, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        with torch.enable_grad():
            x = self._hidden(tokens)
        if not torch.is_grad_enabled():
            x = x.detach()  # what the blocks saved for a gradient is gone before the loss asks for memory
        return self.model.loss(x, targets, reduction)

    def _hidden(self, tokens: Tensor) -> Tensor:
        """The normed stream before the head: (B, T) int64 -> (B, T, C) in compute_dtype."""
        cos, sin = self.model.angles(tokens.size(1))
        # Made here: within a graph each layer would make them anew.
        where = (self.model.config.width // self.model.config.heads, tokens.device)
        masks = {window: window_blocks(tokens.size(1), window, *where) for window in self.model.windows}
        first, *others = self.model.blocks
        x, change = self._first(self.model, tokens, cos, sin, masks[first.attention.window])
        for block in others:
            x, change = self._next(block, x, change, tokens, cos, sin, masks[block.attention.window])
        return self._last(x, change)


def _first(model: GPT, tokens: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
    return model.blocks[0].deferred(model.embedded(tokens), tokens, cos, sin, None, None, mask)


def _next(
    block: Block, x: Tensor, change: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | None
) -> tuple[Tensor, Tensor]:
    return block.deferred(x + change, tokens, cos, sin, None, None, mask)


def _last(x: Tensor, change: Tensor) -> Tensor:
    return norm(x + change)
