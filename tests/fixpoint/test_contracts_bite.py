"""The contract suites find what they are for: each of their tests fails for a solver or rule that breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

import fixpoint
from fixpoint.testing import BackwardContract, SolverContract

# Solvers that break it: each is a damped step with one fault.


@dataclass(frozen=True)
class Sound(fixpoint.Solver):
    """What the broken ones are made from."""

    damping: float = 0.9

    def init(self, z):
        return None

    def step(self, z, fz, state):
        return z + self.damping * (fz - z), state


class NotASolver:
    pass


@dataclass
class Changeable(fixpoint.Solver):
    damping: float = 0.9
    init, step = Sound.init, Sound.step


@dataclass(frozen=True, eq=False)
class ComparedByIdentity(fixpoint.Solver):
    init, step = Sound.init, Sound.step


@dataclass(frozen=True, init=False)
class Swallowing(Sound):
    def __init__(self, damping=0.9, **options):
        object.__setattr__(self, "damping", damping)


@dataclass(frozen=True)
class By(Sound):
    """Steps by a function of z and the residual."""

    rule: Callable = None

    def step(self, z, fz, state):
        return self.rule(z, fz - z), state


def going_back(z, g):
    return z - 0.1 * g


def raising_at_once(z, g):
    raise IndexError("no difference to look at yet")


def in_float32(z, g):
    return z.float() + 0.9 * g.float()


def with_an_absolute_guard(z, g):
    size = g.norm(dim=1, keepdim=True)
    return z + g * size / (size + 1e-3)


def damped_by_the_batch(z, g):
    return z + g / (1 + 0.1 * g.norm(dim=1).mean())


def adding_the_sum_of_all_rows(z, g):
    return z + 0.9 * g + 0 * g.square().sum()  # nothing, until a row overflows


def writing_in_place(z, g):
    return z.add_(0.9 * g)


def rolling_dice(z, g):
    return z + (0.5 + 0.5 * torch.rand(())) * g


def asking_the_device(z, g):
    return z + (0.9 if g.abs().max().item() < 1e3 else 0.1) * g


def without_gradient(z, g):
    return z + 0.9 * g.detach()


def breaking_the_graph(z, g):
    torch._dynamo.graph_break()
    return z + 0.9 * g


@dataclass(frozen=True)
class Unguarded(Sound):
    """Aitken's quotient, which is 0 / 0 where a row is solved."""

    def step(self, z, fz, state):
        g = fz - z
        if state is None:
            return z + 0.5 * g, (g, torch.full_like(g[:, :1], 0.5))
        change = g - state[0]
        damping = -state[1] * (state[0] * change).sum(1, keepdim=True) / change.square().sum(1, keepdim=True)
        return z + damping * g, (g, damping)


@dataclass(frozen=True)
class ForgettingNothing(Sound):
    """Momentum, which stays."""

    def init(self, z):
        return torch.zeros_like(z)

    def step(self, z, fz, state):
        return fz + 0.1 * state, fz - z

    def forget(self, state, rows):
        return state


@dataclass(frozen=True)
class ForgettingAll(ForgettingNothing):
    """Momentum, which rows lose that were not named, too."""

    def forget(self, state, rows):
        return torch.zeros_like(state)


@dataclass(frozen=True)
class PlainIsNoFixedPoint(Sound):
    def plain(self, fz):
        return 0.9 * fz


@dataclass(frozen=True)
class RememberingOnItself(Sound):
    """Momentum from the last move, whoever's it was."""

    last: dict = field(default_factory=dict, compare=False)

    def step(self, z, fz, state):
        move = 0.9 * (fz - z) + 0.1 * self.last.get("move", 0)
        self.last["move"] = move
        return z + move, state


@dataclass(frozen=True)
class Shelving(Sound):
    """Keeps what it has returned, and returns it again to who asks the same."""

    shelf: dict = field(default_factory=dict, compare=False)

    def step(self, z, fz, state):
        asked = repr(fz.tolist()), str(fz.dtype)
        return self.shelf.setdefault(asked, super().step(z, fz, state)[0]), state


@dataclass(frozen=True)
class WritingInItsState(Sound):
    """Momentum, in a buffer that the state before it still points to."""

    def init(self, z):
        return torch.zeros_like(z)

    def step(self, z, fz, state):
        state.mul_(0.1).add_(fz - z, alpha=0.8)
        return z + state, state


@dataclass(frozen=True)
class StartingAtZero(Sound):
    """Takes z0 = 0 for granted and moves no other row; an adjoint starts at the incoming gradient."""

    def init(self, z):
        return (z == 0).all(dim=1, keepdim=True)

    def step(self, z, fz, state):
        return torch.where(state, z + 0.9 * (fz - z), z), state


SOLVER_TESTS = {
    "test_it_is_a_solver": (NotASolver(), "must be an instance of fixpoint.Solver"),
    "test_options_cannot_be_changed": (Changeable(), "damping could be set"),
    "test_equal_options_make_equal_objects": (ComparedByIdentity(), "leave __eq__ to dataclass"),
    "test_it_can_be_copied_and_pickled": (Sound(damping=lambda: 0.9), "lambda"),
    "test_unknown_options_raise": (Swallowing(), "swallowed an unknown option"),
    "test_contractions_are_solved_to_their_closed_form": (By(rule=going_back), "4 of 4 rows did not converge"),
    "test_one_evaluation_and_two_are_enough_to_return_what_was_seen": (By(rule=raising_at_once), "no difference"),
    "test_a_fixed_depth_is_so_many_steps_and_evaluations": (RememberingOnItself(), "not equal"),
    "test_every_precision_keeps_its_dtype_and_is_solved": (By(rule=in_float32), "torch.float16.*found.*torch.float32"),
    "test_scale_changes_nothing_but_the_scale": (
        By(rule=with_an_absolute_guard),
        "evaluations at scale 1e-06|did not converge",
    ),
    "test_a_row_depends_on_no_other_row": (By(rule=damped_by_the_batch), "not close"),
    "test_a_broken_huge_or_tiny_row_harms_no_other": (By(rule=adding_the_sum_of_all_rows), "not close"),
    "test_the_next_step_of_a_forgotten_row_needs_no_earlier_one": (ForgettingNothing(), "forget.. leaves something"),
    "test_a_plain_step_stays_at_a_fixed_point": (PlainIsNoFixedPoint(), "not equal"),
    "test_rows_that_are_solved_get_finite_proposals": (Unguarded(), "NaN or infinity"),
    "test_what_it_is_shown_is_not_written_to": (By(rule=writing_in_place), "was overwritten"),
    "test_what_it_returns_may_be_written_to": (Shelving(), "comes back"),
    "test_what_it_remembers_travels_in_the_state": (RememberingOnItself(), "disturb each other"),
    "test_a_state_can_be_stepped_from_again": (WritingInItsState(), "step 0 twice from one state"),
    "test_the_same_solve_gives_the_same_numbers": (By(rule=rolling_dice), "two equal runs differ"),
    "test_a_step_does_not_wait_for_the_device": (By(rule=asking_the_device), "must not ask for values"),
    "test_it_serves_in_a_layer_and_in_the_adjoint": (StartingAtZero(), "4 of 4 adjoint rows did not converge"),
    "test_gradients_through_its_steps_are_right": (By(rule=without_gradient), "Numerical gradient"),
    "test_a_step_compiles_as_one_graph": (By(rule=breaking_the_graph), "graph_break"),
}


# Backward rules that break it


@dataclass(frozen=True)
class SoundRule(fixpoint.Backward):
    """JFB: what the broken ones are made from."""

    steps: int = 1

    def attach(self, run):
        result = run.solve()
        return run.f(result.z), result


class NotARule:
    pass


@dataclass
class ChangeableRule(fixpoint.Backward):
    attach = SoundRule.attach


@dataclass(frozen=True, eq=False)
class RuleComparedByIdentity(fixpoint.Backward):
    attach = SoundRule.attach


@dataclass(frozen=True, init=False)
class SwallowingRule(SoundRule):
    def __init__(self, **options):
        object.__setattr__(self, "steps", 1)


@dataclass(frozen=True)
class Then(SoundRule):
    """Does something to what is attached and to the result before it returns them."""

    change: Callable = None

    def attach(self, run):
        return self.change(*super().attach(run))


def flattering_figures(value, result):
    return value, replace(result, residual=result.residual / 2)


def without_graph(value, result):
    return value.detach(), result


def state_in_float32(value, result):
    return value, replace(result, z=result.z.float())


def ascent(value, result):
    return 2 * value.detach() - value, result  # the right value, and the gradient with its sign turned


def gradient_of_its_own(value, result):
    return value.detach() + 0 * result.z.requires_grad_(), result


def less_the_batch_mean(value, result):
    mean = value.mean(dim=0)
    return value - mean + mean.detach(), result


def adding_the_sum_of_all_gradients(value, result):
    value.register_hook(lambda grad: grad + 0 * grad.sum())  # nothing, until a row's gradient is not finite
    return value, result


class KeepsItsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.value = z.clone()
        return ctx.value

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_a_reference_cycle(value, result):
    return KeepsItsOutput.apply(value), result


def for_one_backward_only(value, result):
    scale = [1.0]
    value.register_hook(lambda grad: grad * scale.pop())
    return value, result


def leaving_grad_mode_off(value, result):
    torch.set_grad_enabled(False)
    return value, result


RULE_TESTS = {
    "test_it_is_a_backward_rule": (NotARule(), "must be an instance of fixpoint.Backward"),
    "test_options_cannot_be_changed": (ChangeableRule(), "an_attribute_of_no_field could be set"),
    "test_equal_options_make_equal_objects": (RuleComparedByIdentity(), "leave __eq__ to dataclass"),
    "test_it_can_be_copied_and_pickled": (SoundRule(steps=lambda: 1), "lambda"),
    "test_unknown_options_raise": (SwallowingRule(), "swallowed an unknown option"),
    "test_value_and_figures_are_those_of_the_solve": (Then(change=flattering_figures), "not close"),
    "test_every_precision_is_kept": (Then(change=state_in_float32), "torch.float16, found torch.float32"),
    "test_gradients_reach_arguments_parameters_and_closures": (Then(change=ascent), "must be positive, found -"),
    "test_a_row_depends_on_no_other_row": (Then(change=less_the_batch_mean), "not close"),
    "test_a_non_finite_incoming_gradient_spoils_its_row_alone": (
        Then(change=adding_the_sum_of_all_gradients),
        "not close",
    ),
    "test_backward_twice_gives_the_same_twice": (Then(change=for_one_backward_only), "pop from empty list"),
    "test_no_memory_is_held_when_backward_is_skipped": (Then(change=in_a_reference_cycle), "outlive the value"),
    "test_grad_mode_is_left_as_it_was": (Then(change=leaving_grad_mode_off), "left switched off"),
}


MORE_RULES = [
    ("test_value_and_figures_are_those_of_the_solve", Then(change=without_graph), "does not require grad", False),
    (
        "test_gradients_reach_arguments_parameters_and_closures",
        Then(change=gradient_of_its_own),
        "reaches the argument",
        False,
    ),
    ("test_gradients_reach_arguments_parameters_and_closures", SoundRule(), "not close", True),
]


def inherit(contract, **attributes):
    return type("Inherited", (contract,), attributes)()


@pytest.mark.parametrize("name", SOLVER_TESTS)
def test_each_test_of_a_solver_passes_what_is_sound_and_finds_what_it_is_for(name):
    broken, message = SOLVER_TESTS[name]
    getattr(inherit(SolverContract, solver=Sound(), compiles=True), name)()
    with pytest.raises(Exception, match=message):
        getattr(inherit(SolverContract, solver=broken, compiles=True), name)()


def test_a_solver_that_forgets_other_rows_too_is_found():
    with pytest.raises(AssertionError, match="not close"):
        inherit(SolverContract, solver=ForgettingAll()).test_the_next_step_of_a_forgotten_row_needs_no_earlier_one()


def test_a_solver_for_affine_maps_is_shown_no_other():
    bent = inherit(SolverContract, solver=Sound())._maps(bent=True)
    affine = inherit(SolverContract, solver=Sound(), affine_only=True)._maps(bent=True)
    z = torch.ones_like(affine.z0)
    torch.testing.assert_close(affine(z) + affine(-z), 2 * affine(0 * z))
    assert not torch.allclose(bent(z) + bent(-z), 2 * bent(0 * z))


@pytest.mark.parametrize("name", RULE_TESTS)
def test_each_test_of_a_rule_passes_what_is_sound_and_finds_what_it_is_for(name):
    broken, message = RULE_TESTS[name]
    getattr(inherit(BackwardContract, backward=SoundRule()), name)()
    with pytest.raises(Exception, match=message):
        getattr(inherit(BackwardContract, backward=broken), name)()


@pytest.mark.parametrize(
    ("name", "broken", "message", "exact"), MORE_RULES, ids=[f"{row[0]}-{row[2]}" for row in MORE_RULES]
)
def test_other_faults_of_a_rule_are_found_too(name, broken, message, exact):
    with pytest.raises(AssertionError, match=message):
        getattr(inherit(BackwardContract, backward=broken, exact=exact), name)()


@pytest.mark.parametrize(("contract", "known"), [(SolverContract, SOLVER_TESTS), (BackwardContract, RULE_TESTS)])
def test_no_test_of_a_contract_is_left_without_something_to_find(contract, known):
    assert known.keys() == {name for name, _ in inspect.getmembers(contract, inspect.isfunction) if "test_" in name}
