"""What GMRES knows of each row, in the coordinates of its basis: small numbers only."""

from __future__ import annotations

from typing import NamedTuple

from fixpoint.solvers.small import NumPyArithmetic, Small

# A step along the residual goes at least this share of it along the newest vector, to learn about that.
_LEAST_SHARE = 0.1
# The most that rounding may spoil what is learnt near the best point: in roundings of one evaluation; relative to f.
_MOST_ROUNDINGS = 10.0
_MOST_DOUBT = 1e-12
# An image so many times longer than the longest before it is taken for rounding.
_MOST_STRETCH = 10.0
# The best point is evaluated for itself when its residual should be below this share of the least one measured.
_PROGRESS = 0.1
# A predicted residual below so many times its doubt is not known.
_UNKNOWN = 3.0
# A measured residual with more than this share of it outside the basis calls for a new basis.
_OUTSIDE = 0.5
# An image tells nothing new if what is new in it is below this share of its standard error.
_NOISE = 0.1


class Measurement(NamedTuple):
    """A residual that was measured: its coordinates ``(rows, n)``, and per row what lengths it has."""

    inside: Small  # (rows, n)
    outside: Small  # (rows,): length of the part outside the basis
    total: Small  # (rows,): length of the whole
    size: Small  # (rows,): |f(z)|


class Change(NamedTuple):
    """What a measurement means for the vectors of a row, ``(rows,)`` each."""

    begins: Small  # the residual is the first vector of a new basis
    moves: Small  # the row counts from the point that was measured
    waits: Small  # the newest vector stays the newest


class Knowledge(NamedTuple):
    """``M = I - A`` on a basis ``V`` of n vectors: ``M V[:-1] = V H`` with ``H = rotation^T triangle``.

    The image of the newest vector is not known yet. It follows from the next evaluation, at the anchor plus ``step``,
    because f is affine: the residual there is ``V expected`` minus the image times the step along that vector. A vector
    that does not count for a row has a column of the identity and the coordinate zero.
    """

    use: Small  # (rows, n): one where a vector counts
    rotation: Small  # (rows, n, n), orthogonal
    triangle: Small  # (rows, n, n - 1), upper triangular
    target: Small  # (rows, n): rotation times the residual at the base
    anchor: Small  # (rows, n): of the points measured, the one with the least residual, from the base
    anchored: Small  # (rows, n): the residual there
    size: Small  # (rows,): |f| there
    steps: Small  # (rows, n, n - 1), upper triangular: the step by which each image was learnt
    step: Small  # (rows, n): the step to the point that is evaluated now; ends with zero where it teaches no image
    expected: Small  # (rows, n)
    doubt: Small  # (rows,): standard error of the residual expected
    share: Small  # (rows,): how far to go along a residual
    contracts: Small  # (rows,): no plain step has made the residual larger
    careful: Small  # (rows,): images are learnt far from the best point, where rounding spoils them less
    over: Small  # (rows,): the row starts over from the point that is evaluated now

    @property
    def vectors(self) -> int:
        """How many vectors the basis has."""
        return self.use.shape[1]

    def owned(self, xp: NumPyArithmetic) -> Knowledge:
        """The same numbers as arrays or tensors, whichever ``xp`` works on."""
        return Knowledge(*map(xp.own, self))

    @classmethod
    def start(cls, xp: NumPyArithmetic, length: Small, size: Small, before: Knowledge | None) -> Knowledge:
        """A basis of one vector: the residual, of ``length`` ``(rows,)``. Of ``before`` only its experience stays."""
        zero = xp.zeros_like(length)[:, None]
        matrix = zero[:, None] + 1
        return cls(
            use=xp.where(_usable(length)[:, None], zero + 1, zero),
            rotation=matrix,
            triangle=matrix[..., :0],
            target=length[:, None],
            anchor=zero,
            anchored=length[:, None],
            size=size,
            steps=matrix[..., :0],
            step=zero,
            expected=zero,
            doubt=zero[:, 0],
            share=xp.zeros_like(length) + 1 if before is None else before.share,
            contracts=length == length if before is None else before.contracts,
            careful=length < 0 if before is None else before.careful,
            over=length < 0,
        )

    def after(self, xp: NumPyArithmetic, measured: Measurement, moved: Small, eps: float) -> tuple[Knowledge, Change]:
        """What is known after a measurement, in the coordinates of one vector more.

        ``moved`` tells the rows that were not measured where they should have been; they start over.
        """
        finite, verified, pending = measured.total < float("inf"), self.step[:, -1] == 0, self.use[:, -1] > 0
        stray = pending & (measured.outside > _OUTSIDE * measured.total)
        worse = measured.total**2 > (self.anchored**2).sum(-1)
        begins = self.over | moved | (verified & finite & (stray | worse))
        learns, moves = finite & ~begins & ~verified, finite & ~begins & verified

        # The newest vector's image, and the rotation that makes its column one of a triangle.
        zero = xp.zeros_like(measured.size)[:, None]
        seen = _joined(xp, measured.inside, measured.outside[:, None])
        column = (_joined(xp, self.expected, zero) - seen) / xp.where(learns, self.step[:, -1], zero[:, 0] + 1)[:, None]
        turned = _times(self.rotation, column[:, :-1])
        rest, below = turned[:, :-1], column[:, -1:]
        pivot = xp.hypot(turned[:, -1:], below)
        stretch, longest = xp.length((column**2).sum(-1)), self._longest(xp)
        wild = learns & (longest > 0) & (stretch > _MOST_STRETCH * longest)
        noise = self.doubt / abs(xp.where(learns, self.step[:, -1], zero[:, 0] + 1))
        singular = xp.maximum(_NOISE * noise, eps**0.8 * xp.maximum(stretch, zero[:, 0] + 1))
        learnt = learns & ~wild & (pivot[:, 0] > singular)
        # Rounding has taken over: where the point is better than those before, go on from there.
        failed, less = learns & ~learnt, learns & (measured.total**2 <= (self.anchored**2).sum(-1))
        plain = learns & (self.share == 1) & (self.use[:, :-1].sum(-1) == 0)
        contracts = self.contracts & ~(plain & ~less)
        begins, learns = begins | (failed & less), learns & ~(failed & less)
        good = learnt[:, None]
        safe = xp.where(good, pivot, zero + 1)
        cosine, sine = turned[:, -1:] / safe, below / safe

        # Where no image was learnt, the newest vector takes the new place, and the old place counts for nothing.
        unit = _joined(xp, xp.zeros_like(rest), zero + 1)
        upper, last, carried = self.rotation[:, :-1], self.rotation[:, -1], self.target[:, -1:]
        rotation = _stacked(
            xp,
            xp.where(good[:, None], _padded(xp, upper), _shifted(xp, upper)),
            xp.where(good, _joined(xp, cosine * last, sine), _joined(xp, unit, zero))[:, None],
            xp.where(good, _joined(xp, -sine * last, cosine), _shifted(xp, last))[:, None],
        )
        target = _joined(xp, self.target[:, :-1], cosine * carried, -sine * carried)
        target = xp.where(good, target, _shifted(xp, self.target))
        triangle = _grown(xp, self.triangle, xp.where(good, _joined(xp, rest, pivot), unit))
        steps = _grown(xp, self.steps, xp.where(good, self.step, unit))
        use = xp.where(good, self.use, _joined(xp, self.use[:, :-1], zero))
        anchor, anchored = (xp.where(good, _padded(xp, x), _shifted(xp, x)) for x in (self.anchor, self.anchored))

        # A point that was evaluated for itself is the new base; another one may be the new anchor.
        sound = measured.outside > 10 * eps * measured.total
        here = _shifted(xp, measured.inside)
        here = xp.where(pending[:, None], here, _joined(xp, here[:, :-1], measured.outside[:, None]))
        target = xp.where(moves[:, None], _times(rotation, here), target)
        less = less & learns
        anchor = xp.where(less[:, None], _padded(xp, self.anchor + self.step), anchor)
        anchored = xp.where(less[:, None], seen, anchored)
        anchor = xp.where(moves[:, None], xp.zeros_like(anchor), anchor)
        anchored = xp.where(moves[:, None], here, anchored)
        newest = xp.where(learns, learnt & sound, pending | (moves & sound))

        # A row that begins has the residual as its only vector.
        new, eye = begins[:, None], xp.identity(target, self.vectors + 1)
        alone = _joined(xp, xp.zeros_like(use), measured.total[:, None])
        newest = xp.where(begins, _usable(measured.total), newest)[:, None]
        known = Knowledge(
            use=_joined(xp, xp.where(new, xp.zeros_like(use), use), xp.where(newest, zero + 1, zero)),
            rotation=xp.where(new[:, None], eye, rotation),
            triangle=xp.where(new[:, None], eye[:, :-1], triangle),
            target=xp.where(new, alone, target),
            anchor=xp.where(new, xp.zeros_like(anchor), anchor),
            anchored=xp.where(new, alone, anchored),
            size=xp.where(begins | moves | less, measured.size, self.size),
            steps=xp.where(new[:, None], eye[:, :-1], steps),
            step=self.step,
            expected=self.expected,
            doubt=self.doubt,
            share=xp.where(learnt, self._best_share(xp, triangle, rotation), self.share),
            contracts=contracts,
            careful=self.careful | (failed & ~begins),
            over=failed & ~begins,
        )
        return known, Change(begins, moves, ~begins & ~learns & pending)

    def planned(self, xp: NumPyArithmetic, rounding: float, *, last: bool) -> tuple[Knowledge, Small]:
        """The point to evaluate next, from the base ``(rows, n)``, and what is known with it.

        It is one of three. The best point and on along its residual, which teaches the newest vector's image and will
        do as a solution: so goes a contraction. The anchor and a long way along the newest vector, where what was
        learnt near the best point would be spoilt by rounding: a row goes so only if it has been seen to expand. Or the
        best point for itself, to see its residual. A contraction whose residual is as small as its rounding starts over
        at each step, with plain ones.
        """
        zero = xp.zeros_like(self.size)[:, None]
        best = zero
        if self.vectors > 1:
            upper = self.triangle[:, :-1]
            best = _joined(xp, xp.solve_triangular(upper, self.target[:, :-1], upper=True), zero)
        remains = abs(self.target[:, -1:])
        along = self.share[:, None] * self.rotation[:, -1] * self.target[:, -1:]
        least, end = _LEAST_SHARE * self.share[:, None] * remains, along[:, -1:]
        end = xp.where(abs(end) < least, xp.where(end < 0, -least, least), end)
        onward = best - self.anchor + _joined(xp, along[:, :-1], end)
        once = rounding * self.size
        roundings = self._roundings(xp, onward)
        unknown = remains < _UNKNOWN * (once * roundings)[:, None]
        # Where images are spoilt while the residual is still far above one evaluation's rounding, nothing contracts.
        still = self.contracts & ~(unknown[:, 0] & (remains[:, 0] > _UNKNOWN * _MOST_ROUNDINGS * once))
        careful = self.careful | (roundings > max(_MOST_ROUNDINGS, _MOST_DOUBT / rounding))
        careful, contracts = (careful & ~still)[:, None], still[:, None]

        near = remains**2 < _PROGRESS**2 * (self.anchored**2).sum(-1)[:, None]
        pending = ((self.use[:, -1] > 0) & ~self.over)[:, None]
        verify = ~pending | xp.where(careful, near, unknown & ~contracts)
        if last:
            verify = verify | True
        away = _joined(xp, xp.zeros_like(onward[:, :-1]), xp.maximum(remains, self.size[:, None]))
        step = xp.where(verify, best - self.anchor, xp.where(careful, away, onward))
        step = xp.where(abs(step) < float("inf"), step, xp.zeros_like(step))
        turned = (self.triangle @ step[:, :-1, None])[..., 0]
        expected = self.anchored - _times(self.rotation.swapaxes(1, 2), turned)
        careful = self.careful | (careful & pending)[:, 0]
        doubt = once * xp.where(careful, xp.zeros_like(once) + 2**0.5, roundings)
        over = self.over | (contracts & unknown)[:, 0]
        known = self._replace(step=step, expected=expected, doubt=doubt, careful=careful, over=over)
        return known._replace(contracts=still), self.anchor + step

    def _longest(self, xp: NumPyArithmetic) -> Small:
        """Length of the longest image known ``(rows,)``; zero where there is none."""
        if self.vectors == 1:
            return xp.zeros_like(self.size)
        return xp.length(xp.amax(self.use[:, :-1] * (self.triangle**2).sum(1), -1))

    def _best_share(self, xp: NumPyArithmetic, triangle: Small, rotation: Small) -> Small:
        """How far along the last residual the next one would have been least, now that its image is known."""
        residual = self.rotation[:, -1] * self.target[:, -1:]
        image, turned = (triangle @ residual[..., None])[:, :-1, 0], _times(rotation[:, :-1, :-1], residual)
        square = (image**2).sum(-1)
        some = square > 0  # divided by nothing, there is no share, and no gradient
        safe = xp.where(some, square, xp.zeros_like(square) + 1)
        share = xp.maximum((turned * image).sum(-1) / safe, _LEAST_SHARE * abs(self.target[:, -1]) / xp.length(safe))
        share = xp.where(some, share, xp.zeros_like(share))
        return xp.where(share > 0, xp.minimum(share, xp.zeros_like(share) + 1), self.share)

    def _roundings(self, xp: NumPyArithmetic, step: Small) -> Small:
        """Standard error of the residual at a step, in roundings of one evaluation.

        Known images are weighted sums of residuals that were measured, two for each step taken.
        """
        if self.vectors == 1:
            return xp.zeros_like(self.size) + 2**0.5
        weights = xp.solve_triangular(self.steps[:, :-1], step[:, :-1], upper=True)
        return xp.length(2 * (1 + (weights**2).sum(-1)))


def _usable(length: Small) -> Small:
    """Whether a vector of this length can be divided by it."""
    return (length > 0) & (length < float("inf"))


def _times(matrix: Small, x: Small) -> Small:
    return (matrix @ x[..., None])[..., 0]


def _joined(xp: NumPyArithmetic, *parts: Small) -> Small:
    return xp.concatenate(parts, -1)


def _stacked(xp: NumPyArithmetic, *parts: Small) -> Small:
    return xp.concatenate(parts, 1)


def _padded(xp: NumPyArithmetic, x: Small) -> Small:
    """One more coordinate, zero."""
    return _joined(xp, x, xp.zeros_like(x[..., :1]))


def _shifted(xp: NumPyArithmetic, x: Small) -> Small:
    """One more coordinate, which takes over the last one's number."""
    return _joined(xp, x[..., :-1], xp.zeros_like(x[..., :1]), x[..., -1:])


def _grown(xp: NumPyArithmetic, matrix: Small, column: Small) -> Small:
    """An upper triangular ``(rows, n, n - 1)`` with one more column ``(rows, n)`` and a row of zeros."""
    matrix = _joined(xp, matrix, column[..., None])
    return _stacked(xp, matrix, xp.zeros_like(matrix[:, :1]))
