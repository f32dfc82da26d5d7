"""The linear layer of all of the model."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Without bias. The weight stays float32 for the optimizer and is cast to the input's dtype for the product."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `GPT.init_weights` does it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))
