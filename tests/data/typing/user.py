"""A user's program, which tests/test_typing.py gives to mypy --strict. It is not run.

`assert_type` fails where the package says less than this, and so does an ignore that is not needed.
"""

from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import pyquant
from pyquant import checkpoint, functional, load, parallel
from pyquant.formats import FORMATS, Format, ScaleType


def weights(w: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    weight = pyquant.quantize(w, "nf4", 64, nested=True)
    assert_type(weight, pyquant.QuantizedWeight)
    assert_type(weight.to("cuda"), pyquant.QuantizedWeight)
    assert_type(weight.format, Format)
    assert_type(weight.scale_type is ScaleType.NESTED, bool)
    assert_type(weight.state_dict("mlp."), dict[str, torch.Tensor])
    assert_type(pyquant.QuantizedWeight.from_state_dict(weight.state_dict()), pyquant.QuantizedWeight)
    packed = weight.pack("cuda")
    assert_type(packed, pyquant.PackedWeight)
    assert_type(packed.to(torch.device("cpu")), pyquant.PackedWeight)
    assert_type(packed.unpack(), pyquant.QuantizedWeight)
    assert_type(packed.shard(0, rank=0, world_size=2), pyquant.PackedWeight)
    assert_type(packed.shape, torch.Size)
    assert_type(packed.dequantize(torch.bfloat16), torch.Tensor)
    assert_type(pyquant.explain(x, packed, bias), pyquant.Explanation)
    assert_type(pyquant.explain(x, packed).instance, str)
    return assert_type(pyquant.linear(x, packed, bias, pdl=True), torch.Tensor)


class Block(nn.Module):
    def __init__(self, w: pyquant.QuantizedWeight) -> None:
        super().__init__()
        self.up = pyquant.nn.QuantLinear.from_quantized(w)
        self.down = pyquant.nn.QuantLinear.from_linear(nn.Linear(8, 8), "uint4", method="hqq")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert_type(self.up.weight, pyquant.PackedWeight)
        assert_type(self.up.in_features, int)
        y: torch.Tensor = self.down(self.up(x))
        return y


def models(model: nn.Module) -> None:
    assert_type(pyquant.quantize_model(model, "uint4", exclude=["lm_head"]), nn.Module)
    done = pyquant.accelerate(model, free_original=True, compute_dtype=torch.bfloat16)
    assert_type(done, pyquant.Acceleration)
    assert_type(done.kept, dict[str, str])
    done.undo()
    pyquant.load_table(Path("table.json"))
    parallel.ColwiseParallel(use_local_output=False)


def files(path: Path, tensors: dict[str, torch.Tensor]) -> load.LoadedLayer:
    assert_type(checkpoint.load(path), dict[str, torch.Tensor | pyquant.QuantizedWeight])
    with checkpoint.Reader(path) as reader:
        checkpoint.save(path, {name: reader[name] for name in reader})
    try:
        layer = load.gptq(tensors, "mlp", bits=4, group_size=128)
    except load.LoadError:
        layer = load.bitsandbytes(tensors, "mlp")
    assert_type(layer.weight, pyquant.QuantizedWeight)
    assert_type(layer.permutation, torch.Tensor | None)
    assert_type(layer.dequantize(torch.float16), torch.Tensor)
    return layer


def functions(x: torch.Tensor, w: torch.Tensor, state: object) -> torch.Tensor:
    codes, absmax = functional.quantize_kbit(w, k=3)[:2]
    assert_type(codes, torch.Tensor)
    assert_type(absmax, torch.Tensor)
    assert_type(FORMATS["nf4"].bits, int)
    return assert_type(functional.matmul_4bit(x, w, state), torch.Tensor)


def mistakes(x: torch.Tensor, w: torch.Tensor) -> None:
    weight = pyquant.quantize(w, nested=1.5)  # type: ignore[arg-type]
    pyquant.linear(x, weight)  # type: ignore[arg-type]
    weight.pakc()  # type: ignore[attr-defined]
    pyquant.quantize(w, method="gptq")  # type: ignore[arg-type]
