"""`lmdeploy convert` of lmdeploy 0.9.2.post1 without a GPU: test_turbomind.py runs it in a process of its own.

Argument: a JSON list of its options, one dict a conversion. Its compiled module only has to be there, weights stay on
the CPU, and it believes in a GPU that knows bf16. What it writes is its own.
"""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import torch


class Compiled(types.ModuleType):
    """Has any class that one asks for; the converter calls none."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


module = Compiled("_turbomind")
module.__spec__ = ModuleSpec("_turbomind", None)
sys.modules["_turbomind"] = module
torch.Tensor.cuda = lambda self, *words, **options: self
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(major=9, minor=0)

from lmdeploy.turbomind.deploy.converter import main  # noqa: E402

torch.version.cuda = "12.8"
for options in json.loads(sys.argv[1]):
    main(**options)
