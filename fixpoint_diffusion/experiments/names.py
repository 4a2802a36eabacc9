"""The names of the experiments. Nothing here needs PyTorch: a misspelt name is refused without it."""

from __future__ import annotations

from collections.abc import Sequence

from fixpoint_cli.names import hint

# In the order of the list.
NAMES = (
    *(f"deq-ddim/figure-{number}" for number in range(1, 26)),
    *(f"deq-ddim/table-{number}" for number in range(1, 5)),
    *(f"fpdm/figure-{number}" for number in (4, 5, 6, "6a", 7, 8, 9, 10, 11, 12)),
    "fpdm/memory",
    *(f"fpdm/table-{number}" for number in range(1, 6)),
)


def names_meant(names: Sequence[str]) -> list[str]:
    """The names of the experiments that these mean, each once; ``"deq-ddim"`` or ``"fpdm"`` means all of one paper.

    Raises:
        ValueError: for a name that nobody has.

    >>> names_meant(["fpdm/memory", "fpdm/figure-6"])
    ['fpdm/memory', 'fpdm/figure-6']
    >>> names_meant(["fpdm/memry"])
    Traceback (most recent call last):
    ...
    ValueError: no experiment 'fpdm/memry'. Did you mean 'fpdm/memory'? Legal: fpdm/memory, ... (45 in all).
    """
    found: list[str] = []
    for name in names:
        chosen = [each for each in NAMES if each == name or each.startswith(f"{name}/")]
        if not chosen:
            raise ValueError(f"no experiment {name!r}.{hint(name, NAMES)}")
        found += chosen
    return list(dict.fromkeys(found))
