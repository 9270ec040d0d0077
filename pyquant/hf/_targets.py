"""Which parameters of a transformers model are, or are to be, quantized weights."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from .._routers import is_router
from ._experts import fused_weights


@dataclass(frozen=True)
class Target:
    """A parameter of the model as transformers builds it, before it is quantized.

    Attributes:
        name: of the parameter.
        n: out_features, of one expert.
        k: in_features.
        experts: how many a fused tensor holds; None for a linear layer.
        transposed: stored as [.., K, N].
    """

    name: str
    n: int
    k: int
    experts: int | None = None
    transposed: bool = False

    @property
    def module(self) -> str:
        """The name of the module that has the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        matrix = (self.k, self.n) if self.transposed else (self.n, self.k)
        return matrix if self.experts is None else (self.experts, *matrix)

    def layer_names(self) -> list[str]:
        """Names of the quantized layers that take its place."""
        if self.experts is None:
            return [self.module]
        return [f"{self.name}.{e}" for e in range(self.experts)]


def find_targets(model: nn.Module) -> dict[str, Target]:
    """All weights of linear layers and all fused expert weights, by parameter name."""
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if type(module) is nn.Linear:
            target = Target(f"{prefix}weight", module.out_features, module.in_features)
            found[target.name] = target
        elif isinstance(module, Conv1D):
            target = Target(f"{prefix}weight", module.nf, module.nx, transposed=True)
            found[target.name] = target
        for name in fused_weights(module):
            experts, n, k = getattr(module, name).shape
            if module.is_transposed:
                n, k = k, n
            target = Target(f"{prefix}{name}", n, k, experts, bool(module.is_transposed))
            found[target.name] = target
    return found


def wanted_targets(model: nn.Module, skip: Iterable[str], *, keep_routers: bool) -> dict[str, Target]:
    """Those that are neither skipped nor tied to another weight.

    Args:
        model: as transformers builds it.
        skip: as ``PyquantConfig.modules_to_not_convert``.
        keep_routers: skip linear layers that route tokens to experts, too.

    Raises:
        ValueError: there are none.
    """
    skip = list(skip)
    tied = tied_names(model)
    targets = find_targets(model)
    _warn_of_others(model, targets)
    wanted = {
        name: target
        for name, target in targets.items()
        if name not in tied and should_convert_module(target.module, skip) and not (keep_routers and is_router(name))
    }
    if not wanted:
        raise ValueError(
            f"PyquantConfig: {type(model).__name__} has no weight to quantize: {len(targets)} weights of linear "
            f"layers, all of them tied or in modules_to_not_convert={sorted(skip)}"
        )
    return wanted


def tied_names(model: nn.Module) -> set[str]:
    """Parameters that share their weight with another one; they stay as they are."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {*tied.keys(), *tied.values()}


def check_skip_list(model: nn.Module, skip: Iterable[str]) -> None:
    """Raise ValueError for an entry that names no module with parameters, and so keeps nothing as it is."""
    names = [name for name, _ in model.named_modules() if name]
    layers = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    for entry in skip:
        if not all(should_convert_module(name, [entry]) for name in layers):
            continue
        # The end of a name matches that module alone, not what is in it.
        inner = [rf".*\.{entry}"] if any(name.endswith(f".{entry}") for name in names) else []
        similar = inner or difflib.get_close_matches(entry, {*names, *(n.rpartition(".")[2] for n in names)}, 3, 0.5)
        hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        raise ValueError(
            f"PyquantConfig: modules_to_not_convert: {entry!r} names no layer of {type(model).__name__}{hint}"
        )


def _warn_of_others(model: nn.Module, targets: dict[str, Target]) -> None:
    """Matrices in a form of a model's own would else stay in full precision, and nobody would notice."""
    experts = [n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n and n not in targets]
    if experts:
        warnings.warn(
            f"pyquant: {len(experts)} fused expert tensors, such as {experts[0]}, are not quantized: "
            "their module does not follow transformers' interface of experts",
            stacklevel=2,
        )
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kinds = {type(m) for name, m in linears.items() if not is_router(f"{name}.weight")} - {nn.Linear}
    own = sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith("torch."))
    if own:
        warnings.warn(
            f"pyquant: layers of {', '.join(own)} are not quantized: subclasses of nn.Linear may compute anything",
            stacklevel=2,
        )
