"""Other libraries on a model of the same shape, each where it is installed.

Their model is Llama's: its three MLP matrices of width x 8/3 hold as many parameters as this package's two of width x 4. Weights
are random; the time of a greedy generation of a fixed number of tokens does not depend on them.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nanochat.model.gpt import GPT, GPTConfig

Run = Callable[[list[list[int]]], object]
VLLM_MEMORY = 0.4  # of the GPU; the rest stays with the other cases
LLAMA_BATCH = 2048  # tokens that llama.cpp takes at a time


CASES = ("transformers_dynamic", "transformers_static", "vllm", "llama_cpp")


def cases(model: GPT, new_tokens: int) -> dict[str, Run | str]:
    """For each library a function that generates `new_tokens` for each prompt, or why there is none."""
    found: dict[str, Run | str] = {}
    if missing := _missing("transformers"):
        found |= dict.fromkeys(("transformers_dynamic", "transformers_static"), missing)
    else:
        found |= transformers_cases(model.config, model.device, model.compute_dtype, new_tokens)
    found["vllm"] = _missing("vllm") or vllm_case(model.config, new_tokens)
    found["llama_cpp"] = (
        _missing("llama_cpp") or _missing("gguf") or llama_cpp_case(model.config, model.device, new_tokens)
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
            # Without an end of text there is nothing to look for at each step.
            settings = transformers.LlamaConfig(**llama_settings(config) | {"eos_token_id": None})
            model.append(transformers.LlamaForCausalLM(settings).to(device, dtype).eval())
        tokens = torch.tensor(prompts, device=device)
        made = model[0].generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
        if made.size(1) != tokens.size(1) + new_tokens:
            raise RuntimeError(f"made {made.size(1) - tokens.size(1)} tokens instead of {new_tokens}")
        return made

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


def llama_cpp_case(config: GPTConfig, device: torch.device, new_tokens: int) -> Run:
    """Its decoder, all layers on the GPU, with flash attention and all rows in each batch.

    Nothing is drawn from the logits: the same tokens are fed at every step. What choosing takes is left out of its time.
    """
    import llama_cpp

    model: list = []
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # the library holds a bare pointer to it

    def generate(prompts: list[list[int]]) -> None:
        if not model:
            path = write_gguf(Path(tempfile.mkdtemp(prefix="nanochat-llama-")) / "model.gguf", config)
            llama_cpp.llama_log_set(silent, None)
            settings = llama_cpp.llama_model_default_params()
            settings.n_gpu_layers = 999 if device.type == "cuda" else 0
            model.append(llama_cpp.llama_model_load_from_file(str(path).encode(), settings))
        rows, first = len(prompts), len(prompts[0])
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * (first + new_tokens), rows
        settings.n_batch = settings.n_ubatch = max(LLAMA_BATCH, first, rows)
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama_cpp.llama_init_from_model(model[0], settings)
        batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        try:
            _decode_all(llama_cpp, context, batch, prompts, new_tokens, settings.n_batch)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    return generate


def _decode_all(llama_cpp, context, batch, prompts: list[list[int]], new_tokens: int, at_once: int) -> None:
    """As many prompts at a time as `at_once` tokens hold, then `new_tokens` - 1 times a token of every row."""

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        """tokens: (id, position, row, whether its logits are wanted)."""
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = row
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode: {code}")
        llama_cpp.llama_synchronize(context)

    length = len(prompts[0])
    together = max(1, at_once // length)
    for first in range(0, len(prompts), together):
        rows = range(first, min(first + together, len(prompts)))
        decode([(token, at, row, at == length - 1) for row in rows for at, token in enumerate(prompts[row])])
    for position in range(length, length + new_tokens - 1):
        decode([(prompt[0], position, row, True) for row, prompt in enumerate(prompts)])


def write_gguf(path: Path, config: GPTConfig) -> Path:
    """A Llama of this shape as llama.cpp reads it: float16, random, without a vocabulary."""
    import gguf

    sizes, random = llama_settings(config), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    width, inner, kv = config.width, sizes["intermediate_size"], config.width // config.heads * config.kv_heads
    matrices = {"token_embd": (config.vocab_size, width), "output": (config.vocab_size, width)}
    vectors = ["output_norm"]
    for layer in range(config.depth):
        for name, shape in (("attn_q", (width, width)), ("attn_k", (kv, width)), ("attn_v", (kv, width))):
            matrices[f"blk.{layer}.{name}"] = shape
        matrices[f"blk.{layer}.attn_output"] = (width, width)
        for name, shape in (("ffn_gate", (inner, width)), ("ffn_up", (inner, width)), ("ffn_down", (width, inner))):
            matrices[f"blk.{layer}.{name}"] = shape
        vectors += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    for name, shape in matrices.items():
        values = random.standard_normal(shape, dtype=np.float32) * shape[1] ** -0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))
    for name in vectors:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"skipped: {package} is not installed"
