"""Exact sparse attention, and a harness that says from which size on it is faster than dense.

The library, and torch with it, is loaded when one of its names is first asked for: the harness starts without them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_attention._build import BuildError
    from sparse_attention.api import attention, explain, plan
    from sparse_attention.decode import decode
    from sparse_attention.longnet import longnet
    from sparse_attention.patterns import (
        BigBird,
        BlockSparse,
        Causal,
        Csr,
        Dense,
        Dilated,
        Documents,
        Fixed,
        LiveBlocks,
        LogSparse,
        Longformer,
        MultiScale,
        Pattern,
        Predicate,
        Sinks,
        SlidingWindow,
        Strided,
        Tree,
    )
    from sparse_attention.reference import merge

__all__ = [
    "BigBird",
    "BlockSparse",
    "BuildError",
    "Causal",
    "Csr",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "LiveBlocks",
    "LogSparse",
    "Longformer",
    "MultiScale",
    "Pattern",
    "Predicate",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "Tree",
    "attention",
    "decode",
    "explain",
    "longnet",
    "merge",
    "plan",
]

_HOMES = ("_build", "api", "decode", "longnet", "patterns", "reference")


class _Package(ModuleType):
    def __setattr__(self, name, value):
        if name in __all__ and isinstance(value, ModuleType):
            return  # importing the submodule `longnet` or `decode` does not hide the function
        super().__setattr__(name, value)


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = [importlib.import_module(f"{__name__}.{home}") for home in _HOMES]
    globals().update({public: getattr(home, public) for home in homes for public in __all__ if hasattr(home, public)})
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
