"""The methods of token reduction, one a file: frozen settings that choose tokens from queries and keys."""

from genprune.tokens.methods.base import TokenMethod
from genprune.tokens.methods.tome import ToMe
from genprune.tokens.methods.zero_tprune import ZeroTPrune

__all__ = ["ToMe", "TokenMethod", "ZeroTPrune"]
