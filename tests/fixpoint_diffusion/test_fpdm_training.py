"""How the layer of an FPDM is differentiated in training, and what that keeps in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fixpoint
from benchmarks.fpdm_memory import peak_of
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig, cost, load_fpdm, save_fpdm
from fixpoint_diffusion.models.fpdm.training_rules import training_rule

SMALL = FPDMConfig(sample_size=4, width=8, heads=2, max_no_grad=5, max_grad=3)
RULES = ["sjfb", "multi-jfb", "jfb", "phantom", "ift", "shine"]
X, T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.tensor([3, 700])


def lively(config: FPDMConfig, scale: float = 0.25) -> FPDM:
    """In training mode and float64, with random numbers where a new network has zeros."""
    generator = torch.Generator().manual_seed(0)
    model = FPDM(config).double()
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.train()


def gradient(model: FPDM, forward: Callable[[], Tensor]) -> Tensor:
    model.zero_grad()
    forward().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def of_rule(name: str, **options: Any) -> Tensor:
    model = lively(dataclasses.replace(SMALL, backward=name, **options))
    return gradient(model, lambda: model(X, T))


def by_hand(layer: Callable[..., Tensor]) -> Tensor:
    """The gradient with ``layer(f, z0)`` in the place of the implicit layer."""
    model = lively(SMALL)

    def forward() -> Tensor:
        z, inputs, condition = model._before_layer(X, T, None)
        z = layer(lambda z: model.implicit_block(z, *inputs), z)
        for block in model.post:
            z = block(z, condition)
        return model.head(z, condition)

    return gradient(model, forward)


def unrecorded(f: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    with torch.no_grad():
        for _ in range(steps):
            z = f(z)
    return z


def then(no_grad: int, grad: int) -> Callable[..., Tensor]:
    def layer(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        z = unrecorded(f, z, no_grad)
        for _ in range(grad):
            z = f(z)
        return z

    return layer


def phantom(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Its gradient is that of three damped steps; its value is the state that they start from."""
    solved = z = unrecorded(f, z, 5)
    for _ in range(3):
        z = 0.5 * z + 0.5 * f(z)
    return z + (solved - z).detach()


def implicit(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The adjoint equation of each image, solved as a dense system."""
    solved = unrecorded(f, z, 5)
    size = solved[0].numel()
    jacobian = torch.autograd.functional.jacobian(f, solved).reshape(2, size, 2, size)
    image = f(solved)

    def adjoint(v: Tensor) -> Tensor:
        rows = [
            torch.linalg.solve((torch.eye(size) - jacobian[row, :, row]).T, v[row].flatten()) for row in range(len(v))
        ]
        return torch.stack(rows).reshape(v.shape)

    image.register_hook(adjoint)
    return image + (solved - image).detach()


@pytest.mark.parametrize(
    ("name", "layer", "rtol"),
    [("multi-jfb", then(5, 3), 1e-9), ("jfb", then(5, 1), 1e-9), ("phantom", phantom, 1e-9), ("ift", implicit, 1e-3)],
)
def test_gradient_of_each_rule_is_that_by_hand(name: str, layer: Callable[..., Tensor], rtol: float) -> None:
    expected = by_hand(layer)
    assert float((of_rule(name) - expected).norm() / expected.norm()) < rtol


def test_stochastic_rule_draws_one_of_the_hand_loops() -> None:
    config = {"max_no_grad": 1, "max_grad": 2}
    loops = {(n, m): by_hand(then(n, m)) for n in (0, 1) for m in (1, 2)}
    drawn = set()
    for seed in range(24):
        torch.manual_seed(seed)
        found = of_rule("sjfb", **config)
        drawn |= {which for which, loop in loops.items() if torch.allclose(found, loop, rtol=1e-9, atol=1e-12)}
    assert drawn == set(loops)


def test_broydens_inverse_comes_near_to_the_exact_gradient() -> None:
    exact = by_hand(lambda f, z: implicit(f, unrecorded(f, z, 60)))
    jfb, shine = of_rule("jfb", max_no_grad=60), of_rule("shine", max_no_grad=20)
    assert float((shine - exact).norm()) < 0.5 * float((jfb - exact).norm())


def test_start_of_the_layer_can_be_cut_from_the_gradient() -> None:
    def cut(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        return f(z.detach())

    options = {"max_no_grad": 0, "max_grad": 1}
    torch.testing.assert_close(of_rule("multi-jfb", **options), by_hand(then(0, 1)))
    torch.testing.assert_close(of_rule("multi-jfb", attach_start=False, **options), by_hand(cut))


def test_noise_moves_the_start_in_training_alone() -> None:
    model = lively(dataclasses.replace(SMALL, backward="multi-jfb", max_no_grad=0, max_grad=1, start_noise=0.7))
    starts = []
    model.implicit_block.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[0].detach().clone()))
    z0 = model._before_layer(X, T, None)[0]
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model(X, T)
    torch.manual_seed(0)
    torch.testing.assert_close(starts[0], z0.detach() + 0.7 * torch.randn(z0.shape, dtype=z0.dtype))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    model.eval()
    model(X, T, depth=1)
    assert torch.equal(starts[-1], z0)


@pytest.mark.parametrize("name", RULES)
def test_rule_is_written_beside_the_weights_and_acts_in_training_alone(name: str, tmp_path: Any) -> None:
    model = lively(dataclasses.replace(SMALL, backward=name, attach_start=False, start_noise=0.5))
    save_fpdm(model, tmp_path, dtype=torch.float32)
    loaded = load_fpdm(tmp_path)
    assert loaded.config == model.config
    # In evaluation the number of iterations is the caller's, whatever the rule.
    _, solution = loaded(X.float(), T, depth=2, return_solution=True)
    assert solution.nfev == 2
    _, solution = loaded.train()(X.float(), T, depth=2, return_solution=True)
    assert solution.nfev == 2
    # A rule that the caller passes acts alone.
    _, solution = loaded(X.float(), T, backward=fixpoint.JFB(), rtol=1e-1, return_solution=True)
    assert bool(solution.converged.all())


@pytest.mark.parametrize("training", [True, False])
def test_a_solve_to_a_tolerance_is_andersons_whatever_the_rule(training: bool) -> None:
    """Rules that count iterations take plain ones."""
    model = lively(SMALL).train(training)

    def found(**options: Any) -> fixpoint.Solution:
        return model(X, T, return_solution=True, rtol=1e-8, **options)[1]

    for rule in (fixpoint.IFT(), fixpoint.JFB()):
        plain, anderson, own = (
            found(backward=rule, **solver)
            for solver in ({"solver": fixpoint.Picard()}, {"solver": fixpoint.Anderson()}, {})
        )
        assert own.nfev == anderson.nfev < plain.nfev
    counting = fixpoint.MultiStepJFB(no_grad=3, grad=2)
    expected = found(backward=counting, solver=fixpoint.Picard())
    torch.testing.assert_close(found(backward=counting).value, expected.value, rtol=0, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_in_bf16(name: str) -> None:
    model = lively(dataclasses.replace(SMALL, backward=name)).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X.float(), T)
    output.float().square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", RULES)
def test_memory_is_flat_in_the_iterations_that_record_nothing(name: str) -> None:
    """The tensors that a step holds at once, at their most; recorded iterations do cost."""

    def peak(no_grad: int, grad: int) -> int:
        config = dataclasses.replace(SMALL, width=32, backward=name, max_no_grad=no_grad, max_grad=grad)
        model = lively(config).float()
        torch.manual_seed(0)
        return peak_of(model, lambda: model(X.float(), T).square().mean().backward())

    few, many = peak(2, 3), peak(40, 3)
    # SHINE keeps one pair of states for each update of Broyden's: states, not a block's activations.
    state = X.shape[0] * SMALL.tokens * 32 * 4
    assert many <= few + (4 * 38 * state if name == "shine" else 2 * state)
    if name in ("multi-jfb", "phantom"):
        assert peak(2, 9) > few + 20 * state


def test_a_step_holds_at_most_half_of_what_a_dit_of_twelve_layers_holds() -> None:
    shape: dict[str, Any] = {"sample_size": 16, "width": 32, "heads": 4}
    x, t = torch.randn(8, 1, 16, 16), torch.arange(8)
    dit = DiT(DiTConfig(**shape, depth=12))
    fpdm = FPDM(FPDMConfig(**shape, backward="multi-jfb", max_no_grad=8, max_grad=2)).train()
    peaks = [peak_of(model, lambda model=model: model(x, t).square().mean().backward()) for model in (fpdm, dit)]
    assert peaks[0] <= peaks[1] / 2
    # At the published size three recorded iterations are within that, too.
    with torch.device("meta"):
        dit, fpdm = DiT(dataclasses.replace(DiTConfig.preset("XL/2"), depth=12)), FPDM(FPDMConfig.preset("XL/2"))
    half = cost(dit).activation_bytes / 2
    assert cost(fpdm, iterations=10, grad_iterations=3).activation_bytes <= half
    assert cost(fpdm, iterations=10, grad_iterations=4).activation_bytes > half


def test_peak_counts_each_piece_of_memory_while_it_exists() -> None:
    weight = nn.Linear(1, 1)

    def step() -> None:
        one = torch.ones(1000)
        two = one.reshape(10, 100) + 1  # the view is no memory of its own
        del one
        three = two.to(torch.float64)
        three.add_(1)

    assert peak_of(weight, step) == 4000 + 8000
    assert peak_of(weight, lambda: [torch.ones(1000) for _ in range(3)]) == 12000


def test_expected_iterations_are_the_means_of_what_is_drawn() -> None:
    rule = training_rule(FPDMConfig(max_no_grad=12, max_grad=4))
    assert (rule.no_grad, rule.grad, rule.most_grad) == (6, 2.5, 4)
    for name, grad in {"multi-jfb": 4, "jfb": 1, "phantom": 4, "ift": 1, "shine": 1}.items():
        rule = training_rule(FPDMConfig(backward=name, max_no_grad=12, max_grad=4))
        assert (rule.no_grad, rule.grad, rule.most_grad) == (12, grad, grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": "bptt"}, r"FPDMConfig.backward must be one of .*, got 'bptt'"),
        ({"backward": "ift", "max_no_grad": 0}, r"'ift' needs a state to attach to: max_no_grad of at least 1, got 0"),
        ({"start_noise": -1.0}, r"FPDMConfig.start_noise must be finite and not negative, got -1.0"),
        ({"start_noise": float("nan")}, r"FPDMConfig.start_noise must be finite and not negative, got nan"),
        ({"attach_start": 1}, r"FPDMConfig.attach_start must be true or false, got 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)
