"""Who is compared at each budget: static plans, routers with 1, 4 and 8 experts, random routing, noise levels."""

from __future__ import annotations

from dataclasses import asdict, dataclass

BUDGETS = (0.75, 0.5)
# base -> kept MACs -> samples of the fine-tuning, all experts together, as a share of what the base was trained on
FINETUNE = {"unet": {0.75: 0.01, 0.5: 0.05}, "mmdit": {0.75: 0.01, 0.5: 0.02}}


@dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        label: in the tables.
        source: `ecodiff` or `laptop`: a static plan of that method; `router`: trained here.
        route_by: `prompt` or `timestep`, of a router.
        experts: K.
        start: what a router begins around: `ecodiff` (its scores) or `dense` (as published).
        random: whether prompts go to experts drawn at random, as many to each as the router sends there.
    """

    label: str
    source: str = "router"
    route_by: str = "prompt"
    experts: int = 1
    start: str = "ecodiff"
    random: bool = False

    @property
    def slug(self) -> str:
        return self.label.replace(", ", "-").replace(" ", "-").lower()

    @property
    def router_slug(self) -> str:
        """Of the router that it uses, which random routing shares."""
        return f"{self.route_by}-{self.experts}-{self.start}" if self.source == "router" else self.source

    def to_json(self) -> dict:
        return asdict(self)


CANDIDATES = (
    Candidate("EcoDiff", source="ecodiff"),
    Candidate("LAPTOP-Diff", source="laptop"),
    Candidate("1 expert"),
    Candidate("4 experts", experts=4),
    Candidate("8 experts", experts=8),
    Candidate("8 experts, random routing", experts=8, random=True),
    Candidate("4 experts by noise level", route_by="timestep", experts=4),
    Candidate("8 experts, published start", experts=8, start="dense"),
)
