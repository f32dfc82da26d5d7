"""Other libraries on a model of the same shape, each where it is installed.

Their model is Llama's: its three MLP matrices of width x 8/3 hold as many parameters as this package's two of width x 4. Weights
are random; the time of a greedy generation of a fixed number of tokens does not depend on them.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.model.gpt import GPT, GPTConfig

Run = Callable[[list[list[int]]], object]
VLLM_MEMORY = 0.4  # of the GPU; the rest stays with the other cases


def cases(model: GPT, new_tokens: int) -> dict[str, Run | str]:
    """For each library a function that generates `new_tokens` for each prompt, or why there is none."""
    found: dict[str, Run | str] = {}
    if missing := _missing("transformers"):
        found |= dict.fromkeys(("transformers_dynamic", "transformers_static"), missing)
    else:
        found |= transformers_cases(model.config, model.device, model.compute_dtype, new_tokens)
    found["vllm"] = _missing("vllm") or vllm_case(model.config, new_tokens)
    found["llama_cpp"] = (
        _missing("llama_cpp") or "skipped: it reads its own file format, which this package does not write"
    )
    return found


def llama_settings(config: GPTConfig) -> dict:
    """The config.json of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 8 * config.width // 3,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": max(2048, config.sequence_length),
        "rope_theta": config.rope_base,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def transformers_cases(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, new_tokens: int
) -> dict[str, Run | str]:
    """Its growing cache, and its static one, whose steps it compiles on a GPU."""
    import transformers

    model: list[torch.nn.Module] = []

    def generate(prompts: list[list[int]], cache: str) -> torch.Tensor:
        if not model:
            settings = transformers.LlamaConfig(**llama_settings(config))
            model.append(transformers.LlamaForCausalLM(settings).to(device, dtype).eval())
        tokens = torch.tensor(prompts, device=device)
        return model[0].generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )

    return {
        "transformers_dynamic": lambda prompts: generate(prompts, "dynamic"),
        "transformers_static": lambda prompts: generate(prompts, "static"),
    }


def vllm_case(config: GPTConfig, new_tokens: int) -> Run:
    """Its engine with CUDA graphs, weights not loaded."""
    import vllm

    engine: list = []

    def generate(prompts: list[list[int]]) -> object:
        if not engine:
            folder = Path(tempfile.mkdtemp(prefix="nanochat-vllm-"))
            (folder / "config.json").write_text(json.dumps(llama_settings(config) | {"torch_dtype": "bfloat16"}))
            engine.append(
                vllm.LLM(
                    model=str(folder),
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    max_model_len=max(2048, config.sequence_length),
                    gpu_memory_utilization=VLLM_MEMORY,
                )
            )
        sampling = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        return engine[0].generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    return generate


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"skipped: {package} is not installed"
