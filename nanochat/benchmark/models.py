"""A model to measure where none was trained."""

import torch

from nanochat.command_settings import BenchmarkSettings
from nanochat.model.gpt import GPT, GPTConfig


def random_model(settings: BenchmarkSettings) -> GPT:
    """Random weights in every matrix: with the real start all blocks add nothing and all tokens are equally probable."""
    model = GPT(GPTConfig.from_settings(settings.model, settings.vocab_size, settings.sequence_length))
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # a smear's
                parameter.fill_(1.0)
                continue
            scale = {"embedding": 1.0, "head": 3 * model.config.width**-0.5}.get(name, parameter.size(1) ** -0.5)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))
    return model
