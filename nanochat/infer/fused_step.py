"""The decode step as Triton kernels: which kernel runs on which buffers, with which tiles.

`FusedStep` does what `decode.decode_step` does, for the same rows and cache, in 5 kernels a layer instead of about 12. It
serves half precision on CUDA; everything else, and the check of it, is `decode_step`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanochat.infer.decode import Rows
from nanochat.infer.sampling import Kind, sample
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT, Block

GATE_ROWS = 16  # to a multiple of so many the gates' rows are filled up: what follows them stays aligned
HALF = (torch.bfloat16, torch.float16)
PRODUCTS = ("qkv", "out", "up", "down")  # of a layer, in their order
# Of a program, in a product and in the head: what is left for each block of columns has room for no more of them.
FEWEST_COLUMNS, FEWEST_HEAD_COLUMNS = 4, 16
AHEAD_POSITIONS = 16  # of a head, that one thread asks the L2 cache for at once


def unusable(model: GPT) -> str | None:
    """Why the kernels do not serve this model, or None when they do."""
    head_dim = model.config.width // model.config.heads
    if model.device.type != "cuda":
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if model.compute_dtype not in HALF:
        return f"products in {str(model.compute_dtype).removeprefix('torch.')}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"heads of {head_dim}: not a power of two of at least 16"
    if model.config.width % 64:
        return f"width {model.config.width}: not a multiple of 64"
    return None


@dataclass(frozen=True)
class Tile:
    """How a product is cut: (m, n, k) a program and step, `splits` of K among programs, `lanes` of each k among tensor cores,
    `stages` tiles in flight; 0: the weights are held in registers. m < 16: without tensor cores, for few rows."""

    m: int
    n: int
    k: int
    splits: int = 1
    stages: int = 0
    warps: int = 4
    lanes: int = 1

    def fitted(self, inner: int) -> "Tile":
        """The same with the largest steps, and at most as many splits and lanes, that divide K = inner."""
        splits = max(s for s in range(1, self.splits + 1) if inner % (s * 16) == 0)
        k = self.k
        while inner // splits % k:
            k //= 2
        return replace(self, k=k, splits=splits, lanes=max(1, min(self.lanes, k // 16)))


@dataclass(frozen=True)
class Plan:
    """Tiles of each product and of attention for some number of rows."""

    qkv: Tile
    out: Tile
    up: Tile
    down: Tile
    head: Tile
    positions: int  # of a tile of attention, for heads of up to 64; fewer for larger ones
    attention_warps: int
    attention_held: int  # tiles of keys and values in registers, fetched from before waiting for the queries on
    # With none held, or where several queries share a head of keys: tiles in flight through shared memory.
    attention_stages: int = 1
    # That a thread may use, so that more programs wait side by side; 0: as many as the compiler likes.
    attention_registers: int = 0
    # Of a layer's keys and values, of all rows together, that the L2 cache is asked for before its attention, while the memory
    # idles: by the product so many before it (1: right before it).
    ahead_megabytes: int = 0
    ahead_products: int = 1

    def __post_init__(self):
        """ValueError for tiles of too few columns."""
        for name in (*PRODUCTS, "head"):
            columns, fewest = getattr(self, name).n, FEWEST_HEAD_COLUMNS if name == "head" else FEWEST_COLUMNS
            if columns < fewest:
                raise ValueError(f"{name}: a program has {columns} columns; at least {fewest}")


def plan_for(rows: int, head_dim: int = 64) -> Plan:
    """The fastest that `benchmark decode-tiles` found on an H100 at 12 x 768, for 1, 16, 32, 64, 93, 128 and 256 rows with heads of
    64, and for 1, 32, 93 and 128 with heads of 128, where two of them differ.

    With few rows a product is a matter of reading the weights once: narrow blocks, so that all processors read. With many the
    stream is read again for each block of columns: wide blocks, and parts of K where that leaves too few of them.
    """
    if rows <= 2:
        m = power_of_two(rows)
        wide = Tile(m, 16, 256)
        return Plan(wide, Tile(m, 4, 256), wide, Tile(m, 4, 1024), wide, 64, 4, 2, ahead_megabytes=8, ahead_products=2)
    if rows <= 16:
        tile, up = Tile(16, 16, 256, stages=4), Tile(16, 32, 256, warps=8)
        down, head = Tile(16, 8, 512, stages=6, warps=2, lanes=2), Tile(16, 64, 256, stages=3)
        return Plan(tile, tile, up, down, head, 64, 4, 4, ahead_megabytes=16, ahead_products=2)
    if rows <= 32:
        qkv, out = Tile(32, 8, 256, stages=3, warps=2), Tile(16, 64, 256)
        up, down = Tile(32, 32, 256, stages=5, warps=2), Tile(32, 16, 512, splits=2, stages=4)
        positions = 64
        if head_dim > 64:
            qkv, positions = Tile(16, 32, 256), 128
        return Plan(qkv, out, up, down, Tile(32, 64, 128, stages=4), positions, 4, 2)
    tile, head = Tile(64, 64, 128, stages=4), Tile(128, 128, 64, stages=3, warps=8)
    if rows <= 64:
        down = Tile(64, 32, 128, splits=3, stages=6)
        return Plan(tile, tile, tile, down, replace(head, m=64), 64, 4, 1, ahead_megabytes=8)
    out, down = Tile(16, 64, 256), Tile(64, 64, 128, splits=4, stages=6)
    if rows <= 96:
        positions, warps, held, registers = 64, 2, 1, 128
    elif rows <= 128:
        positions, warps, held, registers = 64, 2, 0, 80 if head_dim > 64 else 96
    else:
        positions, warps, held, registers = 32, 1, 1, 128
    return Plan(tile, out, tile, down, head, positions, warps, held, attention_registers=registers, ahead_megabytes=16)


class FusedStep:
    """Weights and buffers of the kernels; called, it decodes one token in each of the first rows."""

    def __init__(self, model: GPT, cache: KVCache, state: Rows):
        """Copies the weights once when they are not in compute_dtype already: a model trained further needs a new one."""
        from nanochat.infer import attention_kernels, decode_kernels, product_kernels

        self.kernels, self.attention, self.products = decode_kernels, attention_kernels, product_kernels
        self.config, self.cache, self.state = model.config, cache, state
        config, dtype, device = model.config, model.compute_dtype, model.device
        self.width, self.head_dim = config.width, config.width // config.heads

        def half(weight: Tensor) -> Tensor:
            return weight.detach().to(dtype).contiguous()

        self.embedding = half(model.embedding)
        self.smear = model.smear
        # Of all products in their order, `PRODUCTS` of each layer and the head; and the layers' value embeddings.
        self.weights = [weight for block in model.blocks for weight in self._weights(block, half)] + [half(model.head)]
        added = [block.attention.value_embedding for block in model.blocks]
        self.value_embeddings = [None if one is None else half(one.embedding) for one in added]
        self.windows = [block.attention.window for block in model.blocks]
        # Rounded as the model rounds them: the keys that prefill stored were turned by these.
        self.cos, self.sin = half(model.cos), half(model.sin)
        on_gpu = device.type == "cuda"
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
        self.pdl = int(on_gpu and torch.cuda.get_device_capability(device) >= (9, 0))
        self.capacity = rows = cache.rows

        def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.x, self.qkv = buffer(rows, self.width), buffer(rows, max(len(qkv) for qkv in self.weights[:-1:4]))
        self.attended, self.hidden = buffer(rows, self.width), buffer(rows, 4 * self.width)
        self.squares = buffer(self.width // FEWEST_COLUMNS, rows, dtype=torch.float32)
        self.best = buffer(rows * -(-config.vocab_size // FEWEST_HEAD_COLUMNS), dtype=torch.float32)
        self.index = buffer(self.best.numel(), dtype=torch.int32)
        self.arrived = buffer(self.width // FEWEST_COLUMNS, rows, dtype=torch.int32)
        self.parts: dict[tuple, Tensor] = {}  # grown before a step is captured
        self.buffer = buffer

    def _weights(self, block: Block, half: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Of a layer's products; that of queries, keys and values has the gates of a value embedding in its last rows."""
        attention, mlp = block.attention, block.mlp
        qkv, *others = (half(linear.weight) for linear in (attention.qkv, attention.out, mlp.up, mlp.down))
        if attention.value_embedding is not None:
            gate = half(attention.value_embedding.gate.weight)  # (KV, channels)
            gates = qkv.new_zeros(-(-len(gate) // GATE_ROWS) * GATE_ROWS, self.width)
            gates[: len(gate), : gate.size(1)] = gate
            qkv = torch.cat((qkv, gates))
        return qkv, *others

    def splits(self, rows: int, length: int) -> int:
        """Into how many parts attention divides the filled positions, of which there are at most `length`: all that the
        kernels need to know of it, enough parts to occupy the device and none shorter than 256."""
        splits = 1
        while 2 * splits * rows * self.config.kv_heads <= 2 * self.processors and length // (2 * splits) >= 256:
            splits *= 2
        return splits

    def __call__(self, rows: int, splits: int, kind: Kind, steps: int = 1, plan: Plan | None = None) -> None:
        """decode_step of the first `rows` rows, `steps` times."""
        plan, state = plan or plan_for(rows, self.head_dim), self.state.first(rows)
        self._embed(state, rows, steps)
        for behind in range(steps, 0, -1):
            self._step(state, rows, splits, kind, plan, behind)

    def _step(self, state: Rows, rows: int, splits: int, kind: Kind, plan: Plan, behind: int) -> None:
        """From the embedded tokens to the new ones; the last but `behind` - 1 of several, of which the next one's are embedded too."""
        products, width = self.products, self.width
        parts = 1
        most_parts = power_of_two(max(-(-width // plan.out.n), -(-width // plan.down.n)))
        for layer in range(self.config.depth):
            qkv, out, up, down = range(4 * layer, 4 * layer + 4)
            self._matmul(rows, plan, qkv, self.x, self.qkv, products.STORE, parts, most_parts)
            self._attend(rows, splits, plan, layer)
            parts = self._add(rows, plan, out, self.attended)
            self._matmul(rows, plan, up, self.x, self.hidden, products.SQUARED_RELU, parts, most_parts)
            parts = self._add(rows, plan, down, self.hidden)
        given, head = None, len(self.weights) - 1
        if kind.cut:
            logits = self._part("logits", self.capacity, self.config.vocab_size)
            self._matmul(rows, plan, head, self.x, logits, products.LOGITS, parts, most_parts)
            given = sample(logits[:rows], state.sampling, state.position + 1, kind)
        else:
            epilogue = products.ARGMAX if kind.greedy else products.DRAW
            self._matmul(rows, plan, head, self.x, self.best, epilogue, parts, most_parts)
        self._finish(state, rows, plan, given, behind)

    def _embed(self, state: Rows, rows: int, steps: int) -> None:
        tokens, *smear = self._smear()
        self.kernels.embed[(rows,)](
            state.token,
            state.column,
            steps,
            self.embedding,
            self.x,
            self.squares,
            tokens,
            state.position,
            state.running,
            *smear,
            **self._entered(),
        )

    def _smear(self) -> tuple:
        """What `embed` and `finish` are told of it: the cache's tokens, gate, scale, length."""
        smear, cache = self.smear, self.cache
        if smear is None:
            return self.x, self.x, self.x, cache.length
        return cache.tokens, smear.gate.weight, smear.scale, cache.length

    def _entered(self) -> dict:
        """Sizes of the same."""
        return {
            "CHANNELS": self.smear.gate.in_features if self.smear else 0,
            "SMEAR": self.smear is not None,
            "WIDTH": self.width,
            "BLOCK": power_of_two(self.width),
        }

    def _named(self, product: int) -> str:
        """What the tile of a step's product of that number is called in a plan."""
        return PRODUCTS[product % 4] if product < len(self.weights) - 1 else "head"

    def _keys_asked(self, rows: int, plan: Plan, product: int) -> tuple[int, int]:
        """Whose keys and values a product asks the L2 cache for: the layer, and how many pieces of each row; (0, 0): none."""
        # Nothing before it in the step asks for the first layer's.
        attention = product + plan.ahead_products - 1 if product else 0
        layer = attention // 4
        if not self.pdl or attention % 4 or layer == self.config.depth:
            return 0, 0
        piece_bytes = 2 * AHEAD_POSITIONS * self.config.kv_heads * self.head_dim * self.x.element_size()
        most = -(-self.cache.length // AHEAD_POSITIONS)
        return layer, min(plan.ahead_megabytes * 2**20 // (rows * piece_bytes), most)

    def _matmul(
        self, rows: int, plan: Plan, product: int, x: Tensor, out: Tensor, epilogue, parts: int, most_parts: int
    ) -> None:
        """The step's product of that number: x (R, K) @ its weight (N, K).T; with parts = 0 x is not normed."""
        weight = self.weights[product]
        outer, inner = weight.shape
        tile = getattr(plan, self._named(product)).fitted(inner)
        layer, pieces = self._keys_asked(rows, plan, product)
        blocks = -(-outer // tile.n)
        sampling = self.state.sampling
        split = epilogue == self.products.ADD and tile.splits > 1
        self.products.matmul[(blocks, -(-rows // tile.m), tile.splits)](
            x,
            weight,
            out,
            self.index,
            self.squares,
            self.squares,
            sampling.temperature,
            sampling.seed,
            self.state.position,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.state.running,
            self._part("shares", tile.splits, self.capacity, outer) if split else self.squares,
            self.arrived,
            rows,
            parts,
            self.capacity,
            blocks,
            self.config.logit_softcap,
            self.cache.length,
            pieces,
            self.windows[layer] or 0,
            outer,
            inner,
            tile.m,
            tile.n,
            tile.k,
            tile.splits,
            tile.lanes,
            tile.stages,
            NORMED=parts > 0,
            PARTS=most_parts,
            EPILOGUE=epilogue.value,
            AHEAD=AHEAD_POSITIONS if pieces else 0,
            KV_HEADS=self.config.kv_heads,
            D=self.head_dim,
            THREADS=32 * tile.warps,
            # What follows a step's first product reads before its own wait what the step before has written.
            **self._launch(tile.warps, late=product == 0),
        )

    def _add(self, rows: int, plan: Plan, product: int, x: Tensor) -> int:
        """The stream += x @ that product's weight.T; returns how many parts the sums of squares have."""
        self._matmul(rows, plan, product, x, self.x, self.products.ADD, 0, 1)
        return -(-self.width // getattr(plan, self._named(product)).n)

    def _attend(self, rows: int, splits: int, plan: Plan, layer: int) -> None:
        """self.attended from self.qkv and the layer's part of the cache, into which the new keys and values go."""
        config, state, embedding = self.config, self.state, self.value_embeddings[layer]
        out, totals = self.attended, self.squares
        if splits > 1:
            out = self._part("attention", splits, self.capacity, self.width)
            totals = self._part("totals", splits, self.capacity, config.heads)
        group, positions = config.heads // config.kv_heads, plan.positions * 64 // max(64, self.head_dim)
        if group == 1:
            kernel, heads = self.attention.attend, (config.heads,)
            # A thread loads 16 bytes at once.
            cut = (positions, min(positions, max(1, 32 * plan.attention_warps * 8 // self.head_dim)))
        else:
            kernel, heads = self.attention.attend_in_groups, (config.heads, config.kv_heads)
            cut = (max(16, power_of_two(group)), max(16, positions))  # tensor cores take no fewer
        kernel[(rows, config.kv_heads, splits)](
            self.qkv,
            self.cache.keys[layer],
            self.cache.values[layer],
            out,
            totals,
            self.cos,
            self.sin,
            state.position,
            state.running,
            state.token,
            self.embedding if embedding is None else embedding,
            self.cache.length,
            self.capacity,
            len(self.weights[4 * layer]),
            embedding is not None,
            self.windows[layer] or 0,
            *heads,
            self.head_dim,
            *cut,
            splits,
            HELD=plan.attention_held,
            STAGES=plan.attention_stages,
            **({"maxnreg": plan.attention_registers} if plan.attention_registers else {}),
            **self._launch(plan.attention_warps),
        )
        if splits > 1:
            self.attention.merge[(rows, config.heads)](
                out, totals, self.attended, self.capacity, config.heads, self.head_dim, splits, **self._launch(1)
            )

    def _finish(self, state: Rows, rows: int, plan: Plan, given: Tensor | None, behind: int) -> None:
        blocks = -(-self.config.vocab_size // plan.head.n)
        self.kernels.finish[(rows,)](
            self.best,
            self.index,
            self.index if given is None else given,
            state.token,
            state.position,
            state.remaining,
            state.running,
            state.stops,
            state.drawn,
            state.column,
            blocks,
            state.drawn.stride(0),
            behind,
            self.embedding,
            self.x,
            self.squares,
            *self._smear(),
            state.stops.size(1),
            power_of_two(state.stops.size(1)),
            power_of_two(blocks),
            GIVEN=given is not None,
            GOES_ON=behind > 1,
            **self._entered(),
            **self._launch(4),
        )

    def _launch(self, warps: int, late: bool = False) -> dict:
        """Launch options; the kernels' own switch and the launcher's go together."""
        return {"num_warps": warps, "PDL": self.pdl * (1 + late)} | ({"launch_pdl": True} if self.pdl else {})

    def _part(self, name: str, *shape: int) -> Tensor:
        """A float32 buffer that only some plans need, allocated at its first use (before a capture: the step is run first)."""
        if (name, *shape) not in self.parts:
            self.parts[name, *shape] = self.buffer(*shape, dtype=torch.float32)
        return self.parts[name, *shape]


def power_of_two(number: int) -> int:
    """The smallest that is at least `number`."""
    return 1 << (number - 1).bit_length()
