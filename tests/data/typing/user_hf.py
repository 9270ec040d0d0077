"""As user.py, with transformers and PEFT."""

from typing import Any

import peft
from typing_extensions import assert_type

import pyquant.hf
import pyquant.peft

config = pyquant.hf.PyquantConfig("nf4", nested=True, modules_to_not_convert=["lm_head"])
assert_type(config.to_dict(), dict[str, Any])
assert_type(pyquant.peft.register(peft.LoraConfig(r=8)), peft.LoraConfig)
pyquant.hf.PyquantConfig(4)  # type: ignore[arg-type]
