"""The named methods: frozen dataclasses that say how to score, and what a plan has to meet. One file a method."""

from __future__ import annotations

from genprune.methods.base import FORMAT_VERSION, Method
from genprune.methods.ecodiff import EcoDiff
from genprune.methods.layers import FinerCut, LaptopDiff
from genprune.methods.ld_pruner import LDPruner
from genprune.methods.obs import OBS
from genprune.methods.registry import MethodCard, method_from_json, method_named, methods
from genprune.methods.simple import Magnitude, Random
from genprune.methods.taylor import Taylor
from genprune.methods.tiny_fusion import TinyFusion

__all__ = [
    "FORMAT_VERSION",
    "OBS",
    "EcoDiff",
    "FinerCut",
    "LDPruner",
    "LaptopDiff",
    "Magnitude",
    "Method",
    "MethodCard",
    "Random",
    "Taylor",
    "TinyFusion",
    "method_from_json",
    "method_named",
    "methods",
]
