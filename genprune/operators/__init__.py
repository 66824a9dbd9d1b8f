"""Operators: cheaper modules that stand in a host module's place, one file each, registered by name."""

from __future__ import annotations
