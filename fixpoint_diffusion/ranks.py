"""The processes that do one piece of work together, as ``torchrun`` starts them: shares, and one end for all.

PyTorch is imported where there are several: the command line comes by here before it has looked at its options.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# Whoever is ready first waits for the last. A process that has ended is noticed at once, whatever this is.
_PATIENCE = timedelta(days=1)

_GOES_ON = "the same command goes on"


class FailedElsewhereError(RuntimeError):
    """Another rank has failed, and says why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; by default it is alone.

    Attributes:
        rank: its number.
        size: how many there are.

    >>> Ranks().share(range(4)), Ranks(1, 3).share(range(4))
    (range(0, 4), range(1, 4, 3))
    """

    rank: int = 0
    size: int = 1

    @classmethod
    @contextlib.contextmanager
    def of_torchrun(cls) -> Iterator[Ranks]:
        """The processes that ``torchrun`` has started, with a process group of gloo for what they tell each other.

        Raises:
            ValueError: an environment that ``torchrun`` does not make.
        """
        size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK")
        if size == "1":
            yield cls()
            return
        if not size.isdecimal() or rank is None:
            raise ValueError(
                f"the environment says WORLD_SIZE={size} and {'no RANK' if rank is None else f'RANK={rank}'}: start "
                f"with torchrun, or unset WORLD_SIZE"
            )
        import torch.distributed as dist

        with ending_group():
            dist.init_process_group("gloo", timeout=_PATIENCE)
            yield cls(dist.get_rank(), dist.get_world_size())

    def device(self, name: str) -> str:
        """The device of this process, where a name such as ``"cuda"`` leaves open which."""
        return name if self.size == 1 or name == "cpu" or ":" in name else f"{name}:{os.environ.get('LOCAL_RANK', 0)}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th of them, from the ``rank``-th on."""
        return items[self.rank :: self.size]

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns here, once it has returned on all ranks.

        Raises:
            Exception: that of ``work``, on the first rank where it has failed.
            FailedElsewhereError: on the others.
            ChildProcessError: if a process has ended before.
        """
        if self.size == 1:
            return work()
        results, failure = list[T](), None
        try:
            results.append(work())
        except Exception as error:  # the others must hear of it, or they would wait
            failure = error
        # Work within this work may have told of another's failure already: that rank is the one to say it.
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        said = enumerate(self.gather((isinstance(failure, FailedElsewhereError), mine)))
        failed = sorted((told, rank, text) for rank, (told, text) in said if text is not None)
        if failed:
            _, first, text = failed[0]
            if first == self.rank and failure is not None:
                raise failure
            raise FailedElsewhereError(f"rank {first} of {self.size} failed: {text}") from failure
        return results[0]

    def of_first(self, value: T) -> T:
        """The value that rank 0 gives; it must be one that pickles."""
        values: list[Any] = self.gather(value if self.rank == 0 else None)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks; they must be such as pickle."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with others_there(_GOES_ON):
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which have one shape and are on the CPU."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        with others_there(_GOES_ON):
            dist.all_reduce(total)
        return total


def is_first() -> bool:
    """Whether this process is alone, or the one of ``torchrun`` or ``accelerate launch`` that speaks."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def ending_group() -> Iterator[None]:
    """A process group that is made in this block ends with it, and so do its threads.

    A thread of gloo that frees a tensor while the interpreter ends aborts the process, after all its work is done. A
    group that was there before is left alone. So is that of a GPU where the block fails.
    """
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized():
        yield
        return
    import torch.distributed.nn  # noqa: F401 - imported later, it would keep the group: as a default of its functions

    try:
        yield
    except BaseException as error:
        # That of a GPU would wait for the others, who do not know yet that this process has failed.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            _clear(error)
            _end_group()
        raise
    if dist.is_initialized():
        _end_group()


def _end_group() -> None:
    """End the process group, with its threads."""
    import torch.distributed as dist

    dist.destroy_process_group()
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None:
        accelerate.PartialState._reset_state()  # or the next training would take the group for there
    gc.collect()  # DistributedDataParallel holds the group too, and is part of a reference cycle


def _clear(error: BaseException) -> None:
    """Empty the frames that this error and those before it have left: among their variables is the group."""
    errors: list[BaseException | None] = [error]
    for each in errors:
        if each is not None:
            traceback.clear_frames(each.__traceback__)
            errors += [other for other in (each.__cause__, each.__context__) if other not in errors]


def require_one_process(command: str) -> None:
    """Refuse several processes of a command that works alone; the first of them says so.

    Raises:
        ValueError: on the first of several.
        FailedElsewhereError: on the others.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    if os.environ.get("RANK", "0") != "0":
        raise FailedElsewhereError(f"{command} works alone")
    raise ValueError(f"{command} works in one process, and here are {size}: start it without torchrun")


@contextlib.contextmanager
def others_there(what_now: str) -> Iterator[None]:
    """What a process group says in this block of a process that has ended, or does not answer, becomes one sentence.

    Args:
        what_now: the end of the sentence, such as ``"the same command goes on"``.

    Raises:
        ChildProcessError: in place of the error of the process group; other errors are left alone.
    """
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        # Gloo has no class for its errors; they name the file of its source that gave up.
        if not dist.is_available() or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        raise ChildProcessError(f"another process of this command has ended; {what_now}") from error


ALONE = Ranks()
