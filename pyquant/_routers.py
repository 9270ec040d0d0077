"""Names of the routers of mixtures of experts, which stay in full precision by default.

They are small, [experts, K], and a rounded one sends tokens to other experts; AWQ, GPTQ and vLLM keep them, too. A
checkpoint says no more than names: ``gate`` alone may be half of a gated layer, as RWKV's.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

ROUTERS = ("*router*", "*mlp.gate.*", "*moe.gate.*", "*feed_forward.gate.*", "*ffn.gate.*", "*shared_expert_gate.*")


def is_router(parameter: str) -> bool:
    """Whether a parameter of this name is a router's."""
    return any(fnmatchcase(parameter.lower(), glob) for glob in ROUTERS)
