"""Other libraries on a model of the same shape, each where it is installed.

Their model is Llama's: its three MLP matrices of width x 8/3 hold as many parameters as this package's two of width x 4. Weights
are random; the time of a greedy generation of a fixed number of tokens does not depend on them.
"""

import ctypes
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
    """Its decoder, all layers on the GPU, with flash attention and all rows in each batch; tokens are chosen where the logits are.

    A context is kept for the next generation of as many rows: making one is no part of the time.
    """
    import llama_cpp

    model: list = []
    contexts: dict[tuple[int, int], _LlamaContext] = {}
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # the library holds a bare pointer to it

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        if not model:
            path = write_gguf(Path(tempfile.mkdtemp(prefix="nanochat-llama-")) / "model.gguf", config)
            llama_cpp.llama_log_set(silent, None)
            settings = llama_cpp.llama_model_default_params()
            settings.n_gpu_layers = 999 if device.type == "cuda" else 0
            model.append(llama_cpp.llama_model_load_from_file(str(path).encode(), settings))
        shape = len(prompts), len(prompts[0])
        if shape not in contexts:
            for context in contexts.values():
                context.close()
            contexts.clear()
            contexts[shape] = _LlamaContext(model[0], *shape, new_tokens)
        return contexts[shape].generate(prompts, new_tokens)

    return generate


class _LlamaContext:
    """llama.cpp's memory for `rows` rows of `length` + `new_tokens` tokens, and a greedy choice on its device for each."""

    def __init__(self, model, rows: int, length: int, new_tokens: int):
        import llama_cpp

        self.llama = llama_cpp
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * (length + new_tokens), rows
        settings.n_batch = settings.n_ubatch = self.at_once = max(LLAMA_BATCH, length, rows)
        settings.n_outputs_max, settings.n_outputs_max_per_seq = rows, 1
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.samplers = [self._greedy() for _ in range(rows)]
        configs = [(row, ctypes.cast(sampler, ctypes.c_void_p)) for row, sampler in enumerate(self.samplers)]
        settings.samplers = (llama_cpp.llama_sampler_seq_config * rows)(*configs)
        settings.n_samplers = rows
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise RuntimeError(f"llama_init_from_model: no context of {rows} rows of {length + new_tokens} tokens")
        self.batch = llama_cpp.llama_batch_init(self.at_once, 0, 1)
        arrays = (self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits)
        self.tokens, self.positions, self.counts, self.wanted = (
            np.ctypeslib.as_array(array, (self.at_once,)) for array in arrays
        )
        self.counts[:] = 1

    def _greedy(self):
        chain = self.llama.llama_sampler_chain_init(self.llama.llama_sampler_chain_default_params())
        self.llama.llama_sampler_chain_add(chain, self.llama.llama_sampler_init_greedy())
        return chain

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """As many prompts at a time as a batch holds, then `new_tokens` - 1 times the token chosen last of every row."""
        length, rows = len(prompts[0]), len(prompts)
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        chosen = []
        together = max(1, self.at_once // length)
        for first in range(0, rows, together):
            part = range(first, min(first + together, rows))
            size = len(part) * length
            self.tokens[:size] = [token for row in part for token in prompts[row]]
            self.positions[:size] = np.tile(np.arange(length), len(part))
            self.wanted[:size] = np.tile(np.arange(length) == length - 1, len(part))
            for i in range(size):
                self.batch.seq_id[i][0] = part[i // length]
            chosen += self._decode(size, range(length - 1, size, length))
        for row in range(rows):
            self.batch.seq_id[row][0] = row
        self.wanted[:rows] = 1
        made = [chosen]
        for position in range(length, length + new_tokens - 1):
            self.tokens[:rows], self.positions[:rows] = made[-1], position
            made.append(self._decode(rows, range(rows)))
        return [list(row) for row in zip(*made, strict=True)]

    def _decode(self, size: int, outputs: range) -> list[int]:
        """Run the first `size` tokens of the batch; the tokens chosen after those at `outputs`."""
        self.batch.n_tokens = size
        if code := self.llama.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode: {code}")
        chosen = [self.llama.llama_get_sampled_token_ith(self.context, i) for i in outputs]
        if min(chosen) < 0:
            raise RuntimeError("llama.cpp chose no token: its samplers do not run on this device")
        return chosen

    def close(self) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
        for sampler in self.samplers:
            self.llama.llama_sampler_free(sampler)


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
