"""transformers loads, quantizes and saves models in pyquant's formats.

Importing this module registers them: transformers has no other way to find a quantizer. Afterwards
``from_pretrained(.., quantization_config=PyquantConfig("nf4", nested=True))`` quantizes while it loads, and
``from_pretrained`` of a folder that ``save_pretrained`` or ``pyquant convert`` wrote loads it as it is.
"""

try:
    from transformers.quantizers import register_quantization_config, register_quantizer

    from ._config import PyquantConfig
    from ._quantizer import PyquantHfQuantizer
except ImportError as error:
    raise ImportError(
        f"pyquant.hf: expected transformers 5.23 or newer ({error}): pip install 'pyquant[hf]'"
    ) from error

from ..checkpoint import QUANT_METHOD

__all__ = ["PyquantConfig", "PyquantHfQuantizer"]

register_quantization_config(QUANT_METHOD)(PyquantConfig)
register_quantizer(QUANT_METHOD)(PyquantHfQuantizer)
