import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch does

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton kernels run: a GPU, elsewhere Triton's interpreter; skips where neither does."""
    triton = pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @triton.jit
    def count(out, n):
        for i in range(0, n):
            triton.language.store(out, triton.language.zeros((), triton.language.int32) + i)

    try:
        count[(1,)](torch.zeros(1, dtype=torch.int32, device=device), 2)
    except Exception as error:  # the interpreter up to 3.6, for one, does not count to a number with numpy 2.4
        pytest.skip(f"triton's interpreter does not run here: {error}")
    return device
