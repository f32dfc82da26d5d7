"""The state of every job, from one batched look at the cluster per cycle."""

from dataclasses import dataclass, field


@dataclass
class Observation:
    """What one look says of one job id. `state` is one of the ledger's; times are unix seconds."""

    state: str = "PENDING"
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    eligible: float | None = None
    nodes: list[str] = field(default_factory=list)
    restart: int = 0
