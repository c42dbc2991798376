"""What became of the clauses of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from vhostmp.tools.stress.clause import Clause
from vhostmp.tools.stress.verdict import Verdict


@attrs.frozen
class Result:
    """The verdict in one clause."""

    id: str
    profile: str
    verdict: Verdict
    source: str
    detail: str
    """Why it failed or does not apply; for people, one line."""
    seed: int
    """With --clause ID --seed this: the same again."""
    question: str
    seconds: float

    @classmethod
    def of(cls, clause: Clause, verdict: Verdict, detail: str = "", *, seed: int = 0, seconds: float = 0.0) -> Result:
        """Make one of a clause."""
        line = "".join(one if one.isprintable() else "?" for one in " ".join(detail.split()))  # XML takes no others
        return cls(clause.id, clause.profile, verdict, clause.source, line, seed, clause.question, seconds)

    def as_json(self) -> dict[str, str | int]:
        """Return it as it stands in the JSON report."""
        return {
            "id": self.id,
            "profile": self.profile,
            "verdict": self.verdict.value,
            "source": self.source,
            "detail": self.detail,
            "seed": self.seed,
        }


def summary(results: Sequence[Result]) -> dict[str, int]:
    """Return how often each verdict was given."""
    counts = Counter(one.verdict for one in results)
    return {verdict.value: counts[verdict] for verdict in Verdict}
