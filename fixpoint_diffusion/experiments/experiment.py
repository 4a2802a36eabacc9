"""What an experiment is: a table or a figure of a paper, as runs, what is shown of them, and a trend that can fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fixpoint import bench
from fixpoint_diffusion.experiments.records import Config, Measures, Record
from fixpoint_diffusion.experiments.resources import Resources

Scale = Literal["quick", "mini", "paper"]
Grid = Mapping[Scale, Sequence[Config]]


@dataclass(frozen=True)
class Verdict:
    """Whether a trend appeared, and what was found, in one line.

    Attributes:
        passed: None while runs are missing.
        found: the figures that it was judged by.
    """

    passed: bool | None
    found: str

    @property
    def word(self) -> str:
        """PASS, FAIL or OPEN."""
        return "OPEN" if self.passed is None else "PASS" if self.passed else "FAIL"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of run. Experiments that ask for the same run of one kind share its record.

    Attributes:
        name: of the folder of its records.
        run: computes the measures of one configuration.
        flops: operations that a run takes, from its configuration alone: for the plan at the paper's scale.
        before: what to type before a run at that scale, such as a training; empty: nothing.
    """

    name: str
    run: Callable[[Config, Resources], Measures]
    flops: Callable[[Config], float]
    before: Callable[[Config], str] = lambda config: ""

    def with_resources(self, resources: Resources) -> Callable[[Config], Measures]:
        """What computes the measures of a configuration with these."""
        return lambda config: self.run(config, resources)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure of a paper.

    Attributes:
        name: ``"deq-ddim/table-1"``.
        claim: what the paper shows there, in one line.
        theirs: the paper's values, in one line; empty where there are none, as for pictures.
        kind: of its runs.
        grid: the configurations at each scale, plain values by name; a run's ``seed`` is one of them.
        blocks: tables, curves and pictures of the records that are there.
        trend: judges the records of all of its runs.
        minutes: what the mini grid takes on one core of a processor, about; shared runs are counted in each.
    """

    name: str
    claim: str
    theirs: str = ""
    kind: Kind
    grid: Grid
    blocks: Callable[[Sequence[Record]], Sequence[bench.Block]]
    trend: Callable[[Sequence[Record]], Verdict]
    minutes: float

    def judge(self, records: Sequence[Record], missing: int) -> Verdict:
        """The verdict on all of its runs; open while some are missing."""
        if missing:
            return Verdict(None, f"{missing} of {missing + len(records)} runs are missing")
        return self.trend(records)

    def study(self, records: Sequence[Record], missing: int) -> bench.Study:
        """The experiment's part of the report."""
        verdict = self.judge(records, missing)
        rows = [("claim", self.claim), ("theirs", self.theirs or "pictures"), ("ours", verdict.found)]
        head = bench.Table(f"{self.name}: {verdict.word}", ("", ""), rows)
        return bench.Study(self.name, self.name, [head, *(self.blocks(records) if records else ())])
