"""Which kernel instances exist. A name is `<device>_<family>_<variant>`, without the last part where a family has one
kernel only: C++ symbol, manifest key and test id.

On the CPU the variant is an instruction set, and the generator writes one source per instance. CUDA instances are
defined in kernels/cuda/; a build without CUDA leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Instance:
    """One kernel as the dispatch sees it."""

    device: str
    family: str
    variant: str

    @property
    def name(self) -> str:
        return "_".join(part for part in (self.device, self.family, self.variant) if part)


# Compiler flags of each CPU instruction set.
CPU_ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    # GCC notes that its ABI for 64-byte vectors changed in 4.6; no function passes them.
    "portable": ("-Wno-psabi",),
}

# Best first: the dispatch takes the first available one of the family it wants.
CPU_INSTANCES = tuple(Instance("cpu", family, isa) for isa in CPU_ISA_FLAGS for family in ("stream", "tile", "dequant"))
CUDA_INSTANCES = (
    *(
        Instance("cuda", family, f"{codes}_{dtype}")
        for family in ("stream", "wgmma", "transposed")
        for codes in ("int4", "codebook4")
        for dtype in ("bf16", "fp16")
    ),
    *(Instance("cuda", "simt", dtype) for dtype in ("fp32", "fp16", "bf16")),
    Instance("cuda", "dequant", ""),
)
INSTANCES = (*CPU_INSTANCES, *CUDA_INSTANCES)
