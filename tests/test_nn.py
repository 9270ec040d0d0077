"""QuantLinear and quantize_model: what a user of nn.Linear expects."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import (
    DTYPES,
    VARIANTS,
    Variant,
    assert_within_budget,
    each_dtype,
    each_format,
    each_variant,
    exact_weight,
    make_weight,
    random_weight,
    same_weight,
    user_codebook,
)
from torch import nn

from pyquant import linear, quantize, quantize_model
from pyquant.formats import FORMATS, Format, ScaleType
from pyquant.load import LoadedLayer
from pyquant.nn import QuantLinear

PLAIN = VARIANTS[0]


def make_layer(variant: Variant = PLAIN, n: int = 33, k: int = 70, bias: bool = True, seed: int = 0) -> QuantLinear:
    return QuantLinear.from_quantized(random_weight(variant, n, k, seed=seed), torch.randn(n) if bias else None)


def same_layer(a: QuantLinear, b: QuantLinear) -> bool:
    biases = (a.bias is None) == (b.bias is None) and (a.bias is None or torch.equal(a.bias, b.bias))
    return biases and same_weight(a.weight, b.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


LINEARS = ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "head"]


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)]


# ---- QuantLinear


def permuted_layer() -> tuple[QuantLinear, torch.Tensor]:
    """A layer with act-order, and its weight with columns in the order of x."""
    weight, permutation = random_weight(PLAIN, 33, 70), torch.randperm(70)
    dense = LoadedLayer(weight, None, permutation).dequantize()
    return QuantLinear.from_quantized(weight, None, permutation), dense


def test_act_order() -> None:
    layer, dense = permuted_layer()
    x = torch.randn(2, 5, 70, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ dense.T)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 5, 70))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer.half()))(x.half()), layer(x.half()))


def test_state_dict_with_act_order() -> None:
    """It comes and goes with what is loaded."""
    layer, _ = permuted_layer()
    state = layer.state_dict()
    assert state["permutation"].dtype == torch.int64
    other = make_layer(bias=False, seed=1)
    other.load_state_dict(state)
    x = torch.randn(3, 70)
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(make_layer(bias=False, seed=1).state_dict())
    assert other.permutation is None
    assert torch.equal(other(x), make_layer(bias=False, seed=1)(x))


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        (torch.arange(69), r"expected torch.int64 \[70\], got torch.int64 \[69\]"),
        (torch.arange(70).int(), r"expected torch.int64 \[70\], got torch.int32 \[70\]"),
        (torch.zeros(70, dtype=torch.int64), "expected every number from 0 to 69 once"),
    ],
)
def test_bad_permutations(permutation: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="QuantLinear: permutation: " + message):
        QuantLinear.from_quantized(random_weight(PLAIN, 33, 70), None, permutation)
    layer, _ = permuted_layer()
    before = layer.permutation.clone()
    with pytest.raises(RuntimeError, match="QuantLinear: permutation: " + message):
        layer.load_state_dict({**layer.state_dict(), "permutation": permutation})
    assert torch.equal(layer.permutation, before)


@each_format
@each_dtype
def test_from_linear(fmt: Format, dtype: torch.dtype) -> None:
    """The layer computes with the quantized weight, in the layer's dtype."""
    linear = nn.Linear(70, 33, dtype=dtype)
    codebook = user_codebook(fmt) if fmt.needs_codebook else None
    layer = QuantLinear.from_linear(linear, fmt.name, codebook=codebook)
    weight = quantize(linear.weight.detach(), fmt.name, codebook=codebook)
    assert same_weight(layer.weight.unpack(), weight)
    assert (layer.in_features, layer.out_features) == (70, 33)
    x = torch.randn(5, 70).to(dtype)
    assert_within_budget(layer(x), x, exact_weight(weight), linear.bias.detach())
    linear.bias.data.zero_()
    assert bool(layer.bias.any()), "the bias is shared with the old layer"


def test_from_linear_without_bias_and_with_arguments() -> None:
    linear = nn.Linear(128, 33, bias=False)
    layer = QuantLinear.from_linear(linear, "nf4", group_size=32, nested=True)
    assert layer.bias is None
    assert layer.weight.group_size == 32
    assert layer.weight.scale_type is ScaleType.NESTED
    assert same_weight(layer.weight.unpack(), quantize(linear.weight, "nf4", group_size=32, nested=True))
    assert list(layer.parameters()) == []


def test_repr() -> None:
    text = repr(make_layer())
    assert "nf4" in text
    assert "33x70" in text
    assert "bits per weight" in text
    assert "bias=True" in text


@each_variant
def test_state_dict_round_trip(variant: Variant) -> None:
    """The canonical weight, under names that do not change; the same bits after loading."""
    layer = make_layer(variant)
    state = layer.state_dict()
    names = {f"weight.{name}" for name in (*random_weight(variant, 33, 70).tensors(), "quant_spec")}
    assert state.keys() == names | {"bias"}
    other = make_layer(variant, seed=1)
    assert not same_layer(layer, other)
    result = other.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert same_layer(layer, other)
    x = torch.randn(5, 70)
    assert torch.equal(layer(x), other(x))


def test_state_dict_loads_any_format_and_group_size() -> None:
    """Any combination loads into any other: sizes, scale types and optional tensors come from the file."""
    target = make_layer(PLAIN)
    assert VARIANTS
    for variant in VARIANTS:
        for group_size in (variant.group_sizes(70)[0], variant.group_sizes(70)[-1]):
            source = QuantLinear.from_quantized(random_weight(variant, 33, 70, group_size), torch.randn(33))
            target.load_state_dict(source.state_dict())
            assert same_layer(source, target)
            assert target.state_dict().keys() == source.state_dict().keys()


def test_state_dict_inside_a_model() -> None:
    model, other = quantize_model(Model(), "nf4"), quantize_model(Model(), "kbit3")
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(6).view(2, 3)
    assert torch.equal(model(tokens), other(tokens))
    assert "blocks.0.0.weight.codes" in model.state_dict()


def test_state_dict_with_assign() -> None:
    layer, other = make_layer(), make_layer(seed=1)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert same_layer(layer, other)


@pytest.mark.parametrize("name", ["codes", "scales", "nested_map", "nested_absmax", "nested_offset", "quant_spec"])
def test_missing_tensors_are_errors(name: str) -> None:
    variant = next(v for v in VARIANTS if str(v) == "nf4-nested")
    layer = make_layer(variant)
    before = copy.deepcopy(layer)
    state = layer.state_dict()
    del state[f"weight.{name}"]
    with pytest.raises(RuntimeError, match=f"weight.{name}"):
        layer.load_state_dict(state)
    assert same_layer(layer, before)


def test_strict_loading() -> None:
    """Missing and unexpected keys, as for any module; not strict: they are returned."""
    layer = make_layer()
    state = layer.state_dict()
    empty = {k: v for k, v in state.items() if not k.startswith("weight.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.quant_spec"):
        layer.load_state_dict(empty)
    assert "weight.quant_spec" in layer.load_state_dict(empty, strict=False).missing_keys
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        layer.load_state_dict({**state, "other": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        make_layer(bias=False).load_state_dict(state)


def test_strict_loading_sees_unknown_parts_of_the_weight() -> None:
    layer = make_layer()
    with pytest.raises(RuntimeError, match=r"weight\.other"):
        layer.load_state_dict({**layer.state_dict(), "weight.other": torch.ones(1)})


def test_loading_a_plain_linear_is_an_error() -> None:
    layer = make_layer()
    with pytest.raises(RuntimeError, match=r"weight\.quant_spec"):
        layer.load_state_dict(nn.Linear(70, 33).state_dict())


@pytest.mark.parametrize(("n", "k"), [(34, 70), (33, 71), (70, 33)])
def test_wrong_shapes_are_errors(n: int, k: int) -> None:
    layer = make_layer(bias=False)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=rf"weight\.quant_spec: expected a weight of \[33, 70\], got \[{n}, {k}\]"):
        layer.load_state_dict(make_layer(n=n, k=k, bias=False).state_dict())
    assert same_layer(layer, before)


@each_variant
def test_casts_leave_the_weight_alone(variant: Variant) -> None:
    """.half() and .to(dtype) are for activations: no scale, codebook or offset is rounded."""
    layer = make_layer(variant)
    weight = layer.weight.unpack()
    for cast, dtype in [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
    ]:
        assert cast(layer) is layer
        assert same_weight(layer.weight.unpack(), weight)
        assert layer.bias.dtype == dtype
        x = torch.randn(5, 70).to(dtype)
        assert_within_budget(layer(x), x, exact_weight(weight), layer.bias.detach())


def test_a_failing_move_leaves_the_layer_alone() -> None:
    """As for .to() of a device that is not there."""
    layer = make_layer(next(v for v in VARIANTS if str(v) == "nf4-nested"))
    before, x = copy.deepcopy(layer), torch.randn(5, 70)

    def fail(t: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        layer._apply(fail)
    assert same_layer(layer, before)
    assert torch.equal(layer(x), before(x))


@each_variant
def test_copies(variant: Variant) -> None:
    """deepcopy, pickle, torch.save: independent layers of the same bits."""
    layer = make_layer(variant)
    x = torch.randn(5, 70)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert same_layer(layer, other)
        assert torch.equal(layer(x), other(x))
        pointers = {t.data_ptr() for t in layer.weight.tensors().values()}
        assert pointers.isdisjoint({t.data_ptr() for t in other.weight.tensors().values()})


def test_state_dict_survives_torch_save() -> None:
    """Tensors only: loads with weights_only."""
    layer, other = make_layer(), make_layer(seed=1)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_layer(layer, other)


def test_training_the_bias() -> None:
    """The weight is frozen; an optimizer moves the bias towards the target, and gradients pass through to x."""
    layer = make_layer()
    layer.bias.requires_grad_()
    weight = layer.weight.unpack()
    x = torch.randn(40, 70)
    target = layer(x).detach() + 3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum(1).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert same_weight(layer.weight.unpack(), weight)


def test_from_linear_keeps_whether_the_bias_trains() -> None:
    linear = nn.Linear(70, 33)
    assert QuantLinear.from_linear(linear).bias.requires_grad
    linear.bias.requires_grad_(False)
    assert not QuantLinear.from_linear(linear).bias.requires_grad


def test_wrong_inputs_name_the_argument() -> None:
    with pytest.raises(RuntimeError, match="gemm: x has K=71, the weight has K=70"):
        make_layer()(torch.randn(5, 71))
    layer, x = make_layer(), torch.randn(5, 70).half()
    with pytest.raises(RuntimeError, match=r"gemm: bias: expected .*Half, got .*Float"):
        linear(x, layer.weight, layer.bias)  # the layer itself casts the bias


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@each_dtype
def test_a_bias_of_another_dtype(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    """The layer casts its bias to x's dtype, and the bias's gradient comes back in the bias's own."""
    weight = random_weight(PLAIN, 33, 70)
    bias = torch.randn(33).to(bias_dtype).requires_grad_()
    layer, x = QuantLinear.from_quantized(weight, bias), torch.randn(5, 70).to(dtype)
    y = layer(x)
    assert_within_budget(y.detach(), x, exact_weight(weight), bias.detach().to(dtype))
    assert torch.equal(y, linear(x, weight.pack(), bias.detach().to(dtype)))
    y.sum().backward()
    assert layer.bias.dtype == bias_dtype
    assert layer.bias.grad.dtype == bias_dtype
    assert torch.equal(layer.bias.grad, torch.full((33,), 5.0, dtype=bias_dtype))


# ---- quantize_model


def test_all_linears_are_replaced_in_place() -> None:
    model = Model()
    reference = copy.deepcopy(model)
    assert quantize_model(model, "int8") is model
    assert quantized_names(model) == LINEARS
    assert not any(type(m) is nn.Linear for m in model.modules())
    tokens = torch.arange(6).view(2, 3)
    y, expected = model(tokens), reference(tokens)
    assert (y - expected).norm() < 0.02 * expected.norm()
    dense = copy.deepcopy(reference)
    for name in LINEARS:
        dense.get_submodule(name).weight.data = model.get_submodule(name).weight.dequantize()
    assert torch.allclose(y, dense(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), ("head",), LINEARS[:4]),
        (("blocks.*",), (), LINEARS[:4]),
        (("blocks.0.*", "head"), (), ["blocks.0.0", "blocks.0.2", "head"]),
        (("*.0",), ("blocks.1.*",), ["blocks.0.0"]),
        (["blocks.?.2"], [], ["blocks.0.2", "blocks.1.2"]),
    ],
    ids=str,
)
def test_include_and_exclude(include: object, exclude: object, expected: list[str]) -> None:
    model = quantize_model(Model(), "nf4", include=include, exclude=exclude)  # type: ignore[arg-type]
    assert quantized_names(model) == expected


def test_include_and_exclude_may_be_iterators() -> None:
    assert quantized_names(quantize_model(Model(), include=iter(["*"]), exclude=iter(["blocks*"]))) == ["head"]


def test_nothing_matched() -> None:
    for arguments in ({"include": ["nothing"]}, {"exclude": ["*"]}):
        with pytest.raises(ValueError, match=r"quantize_model: no nn\.Linear matches include=.*exclude="):
            quantize_model(Model(), "nf4", **arguments)
    with pytest.raises(ValueError, match=r"quantize_model: no nn\.Linear matches"):
        quantize_model(nn.ReLU(), "nf4")


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared})["again"])
    quantize_model(model, "nf4")
    assert quantized_names(model) == ["0", "2"]
    assert model[0] is model[2]


def test_a_bare_linear_is_returned_converted() -> None:
    linear = nn.Linear(64, 32)
    layer = quantize_model(linear, "nf4", group_size=32)
    assert isinstance(layer, QuantLinear)
    assert layer.weight.group_size == 32
    assert type(linear) is nn.Linear


def test_subclasses_of_linear_are_left_alone() -> None:
    """Attention reads out_proj.weight itself."""
    model = nn.Sequential(nn.Linear(64, 64), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True))
    quantize_model(model, "nf4")
    assert quantized_names(model) == ["0", "1.linear1", "1.linear2"]


def test_attention_still_runs() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    quantize_model(model, "int8")
    assert quantized_names(model) == ["linear1", "linear2"]
    for train in (True, False):
        assert bool(torch.isfinite(model.train(train)(torch.randn(2, 5, 64))).all())


def test_an_error_leaves_the_model_alone() -> None:
    """A layer that cannot be quantized: the error comes, and no layer was replaced."""
    model = Model()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite values"):
        quantize_model(model, "nf4")
    assert quantized_names(model) == []
    for arguments in ({"format": "nf5"}, {"group_size": 48}, {"method": "none"}):
        with pytest.raises(ValueError, match="expect"):
            quantize_model(model, **{"format": "nf4", **arguments})
        assert quantized_names(model) == []


def test_train_and_eval_mode_is_kept() -> None:
    model = quantize_model(Model().eval(), "nf4")
    assert [name for name, m in model.named_modules() if m.training] == []


@each_dtype
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = quantize_model(Model().to(dtype), "int4")
    assert model(torch.arange(3)).dtype == dtype
    assert model.head.weight.scales.dtype == dtype


def test_formats_are_those_of_the_table() -> None:
    for name, fmt in FORMATS.items():
        codebook = {"codebook": user_codebook(fmt)} if fmt.needs_codebook else {}
        assert quantized_names(quantize_model(Model(), name, **codebook)) == LINEARS


def test_weight_property_is_packed_from_the_buffers() -> None:
    """Moving the module's buffers moves the weight: nothing is cached."""
    layer = QuantLinear.from_quantized(make_weight(PLAIN, 33, 70))
    with torch.no_grad():
        layer._buffers["_scales"].zero_()
    assert torch.equal(layer(torch.randn(5, 70)), torch.zeros(5, 33))
