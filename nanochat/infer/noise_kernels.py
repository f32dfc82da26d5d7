"""The sampler's noise in Triton: `sampling.gumbel`, number for number."""

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, draw, token):
    """seed and draw (R,) uint32, token (N,) -> (R, N) float32."""
    golden: tl.constexpr = 0x9E3779B9
    key = _mix(_mix(seed) + draw * golden)
    bits = _mix(key[:, None] ^ _mix((token + 1).to(tl.uint32) * golden)[None, :]) >> 8
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * (1.0 / 16777216), 1.0 - 1.0 / 16777216)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mix(bits):
    """murmur3's finaliser on uint32."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)
