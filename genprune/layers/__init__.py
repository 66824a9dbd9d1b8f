"""Layer and operator pruning: what may go or be replaced as a whole, and what its absence does to the output."""

from __future__ import annotations
