"""The shared kernel of Quartet: configuration, messages, sockets, stage life cycle, launcher, command line.

Every process imports this package, so nothing here may import torch, transformers or sanic.
"""
from __future__ import annotations

__version__ = "0.1.0"
