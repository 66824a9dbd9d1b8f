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
        changes: of the settings that the other routers have, by name.
        random: whether prompts go to experts drawn at random, as many to each as the router sends there.
    """

    label: str
    source: str = "router"
    route_by: str = "prompt"
    experts: int = 1
    changes: tuple[tuple[str, float], ...] = ()
    random: bool = False

    @property
    def slug(self) -> str:
        return self.label.replace(", ", "-").replace(" ", "-").lower()

    @property
    def router_slug(self) -> str:
        """Of the router that it uses, which random routing shares."""
        if self.source != "router":
            return self.source
        return f"{self.route_by}-{self.experts}-{'apart' if self.changes else 'ecodiff'}"

    def to_json(self) -> dict:
        return asdict(self)


# a predictor that sets out with the published spread, and budgets pushed apart
FAR_APART_AT = (0.75,)
APART = (("predictor_scale", 1.0), ("predictor_learning_rate", 1e-3), ("spread_weight", 1.0))
CANDIDATES = (
    Candidate("EcoDiff", source="ecodiff"),
    Candidate("LAPTOP-Diff", source="laptop"),
    Candidate("1 expert"),
    Candidate("8 experts", experts=8),
    Candidate("8 experts, random routing", experts=8, random=True),
    Candidate("4 experts by noise level", route_by="timestep", experts=4),
    Candidate("8 experts, far apart", experts=8, changes=APART),
    Candidate("8 experts, far apart, random routing", experts=8, changes=APART, random=True),
    Candidate("4 experts", experts=4),
)
