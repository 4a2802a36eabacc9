"""The training-memory column of Table 1: what a training step holds, counted from shapes."""

from __future__ import annotations

from collections.abc import Sequence

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Kind, Verdict
from fixpoint_diffusion.experiments.plans import published
from fixpoint_diffusion.experiments.records import Config, Measures, Record
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig, cost

_BATCH = 64
_PER_PARAMETER = 20  # bytes: weight, gradient, AdamW's two moments and the average, in float32


def _count(config: Config, resources: Resources) -> Measures:
    """``network``, ``size``, and for an FPDM ``no_grad`` and ``grad`` iterations: N, and the most recorded ones M."""
    if config["size"] == "XL/2":
        model = published(config["network"])
    elif config["network"] == "dit":
        model = DiT(DiTConfig(width=32, heads=2, depth=12))
    else:
        model = FPDM(FPDMConfig(width=32, heads=2))
    made, recorded = config["no_grad"] + config["grad"], config["grad"]
    one = cost(model, iterations=made, grad_iterations=recorded) if isinstance(model, FPDM) else cost(model)
    return {
        "activations": one.activation_bytes * _BATCH / 1e9,
        "weights": one.parameters * _PER_PARAMETER / 1e9,
        "parameters": one.parameters,
    }


COUNTS = Kind(name="training-memory", run=_count, flops=lambda config: 0.0)


def _table(records: Sequence[Record]) -> list[bench.Block]:
    rows = [
        (
            _label(record.config),
            record.measures["parameters"],
            record.measures["activations"],
            record.measures["weights"],
            _total(record),
        )
        for record in records
    ]
    caption = (
        f"GB in float32 with {_BATCH} images: what autograd keeps, and weights, gradients, AdamW's moments and the "
        "average. Theirs, in mixed precision: DiT 25.2, FPDM 10.2."
    )
    return [bench.Table("Training memory", ("network", "parameters", "activations", "weights", "sum"), rows, caption)]


def _label(config: Config) -> str:
    if config["network"] == "dit":
        return f"DiT {config['size']}"
    return f"FPDM {config['size']}, N = {config['no_grad']}, M = {config['grad']}"


def _total(record: Record) -> float:
    return record.measures["activations"] + record.measures["weights"]


def _less(records: Sequence[Record]) -> Verdict:
    """With the paper's M = N = 12 the FPDM holds less than half of what the DiT holds; N alone changes nothing."""
    dit = next(_total(record) for record in records if record.config["network"] == "dit")
    shares = {
        (record.config["no_grad"], record.config["grad"]): _total(record) / dit
        for record in records
        if record.config["network"] == "fpdm"
    }
    by_grad: dict[int, set[float]] = {}
    for (_, grad), share in shares.items():
        by_grad.setdefault(grad, set()).add(round(share, 6))
    flat = all(len(each) == 1 for each in by_grad.values())
    text = ", ".join(f"N={n} M={m} {share:.3f}" for (n, m), share in shares.items())
    return Verdict(
        flat and shares[max(shares, key=lambda case: case[::-1])] < 0.5, f"share of the DiT's {dit:.3g} GB: {text}"
    )


def _grid(size: str, cases: Sequence[tuple[int, int]]) -> list[Config]:
    fpdm = [{"network": "fpdm", "size": size, "no_grad": n, "grad": m} for n, m in cases]
    return [{"network": "dit", "size": size, "no_grad": 0, "grad": 0}, *fpdm]


_CASES = ((3, 3), (6, 6), (12, 6), (24, 6), (12, 12))
MEMORY = Experiment(
    name="fpdm/memory",
    claim="Training an FPDM takes 60 % less memory than a DiT, whatever the number of iterations that record nothing.",
    theirs="10.2 GB against 25.2 GB, XL/2, batch 64, M = N = 12",
    kind=COUNTS,
    grid={
        "quick": _grid("small", ((2, 2), (6, 2))),
        "mini": _grid("XL/2", _CASES),
        "paper": _grid("XL/2", _CASES),
    },
    blocks=_table,
    trend=_less,
    minutes=1,
)
ENTRIES = (MEMORY,)
