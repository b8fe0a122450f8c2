"""Invariant 9: planted faults make the start-up self-test refuse to train, on every backend."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import pytest
import torch

from privtrain.backends import LocalBackend, Placement, base, shards
from privtrain.clipping import capture, clipper, cooperative, exact_sum, rules, styles
from privtrain.errors import SelfTestFailed
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import StepNoise, noised_vector
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.sum_digest import bind
from privtrain.training import auxiliary_sums, selftest
from privtrain.training import trainer as trainer_module
from privtrain.training.trainer import Trainer
from tests.conftest import save_tiny_llama
from tests.privtrain.cells import SHARDED, Cell, make_backend, make_trainer, self_test
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
LORA = Cell(noise_multiplier=1.3)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """One layer, which is where every mutant is."""
    return save_tiny_llama(tmp_path_factory.mktemp("shallow-llama"), num_layers=1)


def check(directory, backend=None, cell: Cell = LORA) -> Trainer:
    trainer = make_trainer(backend or LocalBackend(CPU), directory, cell)
    self_test(trainer)
    return trainer


def test_it_passes_and_leaves_the_model_bit_for_bit_as_it_was(tiny_llama):
    trainer = make_trainer(LocalBackend(CPU), tiny_llama, LORA)
    before = [p.detach().clone() for p in trainer.layout.parameters.values()]
    self_test(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.layout.parameters.values(), strict=True))
    assert all(p.grad is None for p in trainer.layout.parameters.values())


def unclipped(style, norms, clipping_norm):
    return torch.ones_like(norms)


def wrong_rule(module, activation, output_gradient):
    return rules.linear(module, activation, 0 * output_gradient)


class DoubleNoise(LocalBackend):
    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        return super().add_noise(total, layout, noise, exponent=exponent, stddev=2 * stddev)


class NoNoise(LocalBackend):
    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        return super().add_noise(total, layout, noise, exponent=exponent, stddev=0.0)


class MeanNotSum(LocalBackend):
    def reduce_total(self, total):
        return total.div_(2, rounding_mode="trunc")


class Doubled(LocalBackend):
    def reduce_total(self, total):
        return total.mul_(2)


def test_mutant_clipping_skipped(tiny_llama, monkeypatch):
    monkeypatch.setattr(styles, "factors", unclipped)
    with pytest.raises(SelfTestFailed, match="above clipping_norm"):
        check(tiny_llama)


def test_mutant_rule_that_loses_a_layer(tiny_llama, monkeypatch):
    monkeypatch.setitem(rules._RULES, torch.nn.Linear, wrong_rule)
    with pytest.raises(SelfTestFailed, match="is off by"):
        check(tiny_llama)


def test_mutant_one_layer_is_not_captured(tiny_llama, monkeypatch):
    original = capture.captured
    monkeypatch.setattr(
        clipper,
        "captured",
        lambda modules, parameters, num_rows: original(dict(list(modules.items())[1:]), parameters, num_rows),
    )
    monkeypatch.setattr(clipper.PerUnitClipper, "_refuse_hidden_uses", lambda *_: None)  # which would see it first
    with pytest.raises(SelfTestFailed, match="a layer is not covered"):
        check(tiny_llama)


def test_mutant_a_unit_is_clipped_record_by_record(tiny_llama, monkeypatch):
    original = clipper.PerUnitClipper.accumulate

    def forgetful(self, batch):
        original(self, batch)
        if self._open is not None:
            so_far, self._open.gradient = self._open.gradient, {}
            self._add_unit(dataclasses.replace(batch, last_continues=False), len(batch.owners) - 1, so_far)

    monkeypatch.setattr(clipper.PerUnitClipper, "accumulate", forgetful)
    with pytest.raises(SelfTestFailed):
        check(tiny_llama)


def test_mutant_a_listed_parameter_is_frozen(tiny_llama):
    trainer = make_trainer(LocalBackend(CPU), tiny_llama, LORA)
    next(iter(trainer.layout.parameters.values())).requires_grad_(False)
    with pytest.raises(SelfTestFailed, match="frozen but listed as trained"):
        self_test(trainer)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (DoubleNoise, "noise has standard deviation"),
        (NoNoise, "noise has standard deviation"),
        (MeanNotSum, "is off by"),
        (Doubled, "above clipping_norm"),
    ],
)
def test_mutant_backend(tiny_llama, backend, message):
    with pytest.raises(SelfTestFailed, match=message):
        check(tiny_llama, backend(CPU))


def added_up_in_fp32(total, gradients, weights):
    found = torch.nan_to_num(gradients * weights.view(-1, *[1] * total.ndim)).sum(dim=0)
    total.copy_((total.float() + found).to(torch.int64))


class ReducedInFp32(LocalBackend):
    def reduce_total(self, total):
        return total.copy_(total.float().to(torch.int64))


@pytest.mark.parametrize("route", ["batched", "one_unit"])
def test_mutant_units_added_up_in_fp32(tiny_llama, monkeypatch, route):
    monkeypatch.setattr(exact_sum, "add_units", added_up_in_fp32)
    with pytest.raises(SelfTestFailed, match=r"do not add up exactly|does not add the same bits to the sum"):
        check(tiny_llama, cell=dataclasses.replace(LORA, route=route))


def test_mutant_reduction_in_fp32(tiny_llama):
    with pytest.raises(SelfTestFailed, match="do not add up exactly"):
        check(tiny_llama, ReducedInFp32(CPU))


# Mutants of what only several units, a second step or training mode show.


def factors_of_the_first_unit(style, norms, clipping_norm):
    found = FACTORS(style, norms, clipping_norm)
    return torch.where(torch.isfinite(norms).all(dim=0), found[:, :1].expand_as(found), 0.0)


def factors_for_what_is_not_finite(style, norms, clipping_norm):
    return torch.where(torch.isfinite(norms), FACTORS(style, norms, clipping_norm), 1.0)


def factors_that_normalise(style, norms, clipping_norm):
    return torch.where(torch.isfinite(norms).all(dim=0), clipping_norm / norms, 0.0)


def forgets_to_clear(self):
    self.diagnostics = clipper.ClippingDiagnostics()
    self._open = None


FACTORS = styles.factors


@pytest.mark.parametrize("route", ["batched", "two_pass", "one_unit"])
@pytest.mark.parametrize("factors", [factors_for_what_is_not_finite, factors_that_normalise])
def test_mutant_factors(tiny_llama, monkeypatch, factors, route):
    monkeypatch.setattr(styles, "factors", factors)
    with pytest.raises(SelfTestFailed, match=r"is off by|above clipping_norm"):
        check(tiny_llama, cell=dataclasses.replace(LORA, route=route))


@pytest.mark.parametrize("route", ["batched", "two_pass"])
def test_mutant_one_factor_for_all_units_of_a_microbatch(tiny_llama, monkeypatch, route):
    monkeypatch.setattr(styles, "factors", factors_of_the_first_unit)
    with pytest.raises(SelfTestFailed, match="units are mixed"):
        check(tiny_llama, cell=dataclasses.replace(LORA, route=route))


@pytest.mark.parametrize("clipping_norm", [1e-4, 1e5])
def test_mutant_clipping_skipped_under_any_norm(tiny_llama, monkeypatch, clipping_norm):
    cell = dataclasses.replace(LORA, clipping_norm=clipping_norm)
    check(tiny_llama, cell=cell)
    monkeypatch.setattr(styles, "factors", unclipped)
    with pytest.raises(SelfTestFailed, match="above clipping_norm"):
        check(tiny_llama, cell=cell)


def test_mutant_reset_does_not_clear(tiny_llama, monkeypatch):
    monkeypatch.setattr(clipper.PerUnitClipper, "reset", forgets_to_clear)
    with pytest.raises(SelfTestFailed, match="above clipping_norm"):
        check(tiny_llama)


def test_mutant_the_sensitivity_that_training_scales_noise_by(tiny_llama, monkeypatch):
    monkeypatch.setattr(clipper.PerUnitClipper, "sensitivity", 1e-6)
    with pytest.raises(SelfTestFailed, match="noise has standard deviation"):
        check(tiny_llama)


class NoiseOfNoKey(LocalBackend):
    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        noise = StepNoise(SecretKey.insecure(0, "noise"))
        return super().add_noise(total, layout, noise, exponent=exponent, stddev=stddev)


def test_mutant_noise_that_is_the_same_in_every_step(tiny_llama):
    with pytest.raises(SelfTestFailed, match="different noise"):
        check(tiny_llama, NoiseOfNoKey(CPU))


@pytest.mark.parametrize("style", ["flat", "adaptive"])
def test_mutant_noise_keyed_without_the_sum(tiny_llama, monkeypatch, style):
    def keyed_by_the_step_alone(key, step, total, *arguments, **named):
        return bind(key, step, torch.zeros_like(total), *arguments, **named)

    monkeypatch.setattr(trainer_module, "bind", keyed_by_the_step_alone)
    with pytest.raises(SelfTestFailed, match="not keyed by the sum"):
        check(tiny_llama, cell=dataclasses.replace(LORA, style=style))


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_mutant_adaptive_count_with_too_little_noise(tiny_llama, monkeypatch, factor):
    cell = dataclasses.replace(LORA, style="adaptive")
    check(tiny_llama, cell=cell)
    original = auxiliary_sums.noised
    monkeypatch.setattr(
        auxiliary_sums, "noised", lambda total, *, stddev, **named: original(total, stddev=factor * stddev, **named)
    )
    with pytest.raises(SelfTestFailed, match="was released as"):
        check(tiny_llama, cell=cell)


def couple_rows_in_training(model) -> None:
    def subtract_mean(module, inputs, output):
        return output - 0.9 * output.mean(dim=0, keepdim=True) if module.training else None

    next(m for name, m in model.named_modules() if name.endswith("mlp")).register_forward_hook(subtract_mean)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_mutant_rows_are_coupled_in_training_mode_alone(tiny_llama, gradient_checkpointing):
    cell = dataclasses.replace(LORA, gradient_checkpointing=gradient_checkpointing)
    check(tiny_llama, cell=cell)
    trainer = make_trainer(LocalBackend(CPU), tiny_llama, cell)
    couple_rows_in_training(trainer.model)
    with pytest.raises(SelfTestFailed, match="is off by"):
        self_test(trainer)


def test_dropout_is_off_for_the_test_and_then_as_it_was(tiny_llama):
    """Dropout as a module, as a number in attention and in a config; and one module that is not in training mode."""
    trainer = make_trainer(LocalBackend(CPU), tiny_llama, LORA)
    attention = next(m for name, m in trainer.model.named_modules() if name.endswith("self_attn"))
    attention.attention_dropout = attention.config.attention_dropout = 0.3
    attention.q_proj.lora_dropout["default"] = torch.nn.Dropout(0.4)
    trainer.model.get_input_embeddings().eval()
    modes = [module.training for module in trainer.model.modules()]
    self_test(trainer)
    assert [module.training for module in trainer.model.modules()] == modes
    assert attention.attention_dropout == attention.config.attention_dropout == 0.3
    assert attention.q_proj.lora_dropout["default"].p == 0.4


def parts_add_up(first: int, count: int, others: list[tuple[int, int]], size: int) -> bool:
    """Of a tensor, this rank's part and those of others, by the self-test."""
    model = torch.nn.ParameterDict({"w": torch.zeros(count)})
    layout = Layout(dict(model.named_parameters()), {"w": (first, (size,))})
    backend = LocalBackend(CPU)

    def sum_parts(vector):
        for low, number in others:
            high = low + number
            squares = [n * (n - 1) * (2 * n - 1) // 6 for n in (low, high)]
            sums = [number, (low + high - 1) * number // 2, squares[1] - squares[0]]
            vector += torch.tensor([x % selftest._PRIME for x in sums])

    backend.sum_parts = sum_parts
    try:
        selftest._check_coverage(model, Placement(layout, layout, 0, 1), backend)
    except SelfTestFailed:
        return False
    return True


@pytest.mark.parametrize("size", [4, 1 << 33, 1 << 60])
def test_coverage_is_exact_for_tensors_of_any_size(size):
    assert parts_add_up(0, 2, [(2, size - 2)], size)
    assert not parts_add_up(0, 2, [(3, size - 3)], size)  # one is stepped by nobody
    assert not parts_add_up(0, 2, [(1, size - 2)], size)  # one by two, the last by nobody
    assert not parts_add_up(1, 2, [(1, 2)], 4)  # as many, with the same sum


# On several ranks: each mutant patches what the job runs, in the ranks alone.


def noise_of_world_size(backend, patch) -> None:
    original = backend.add_noise
    patch.setattr(
        backend,
        "add_noise",
        lambda total, layout, noise, *, exponent, stddev, history=None: original(
            total, layout, noise, exponent=exponent, stddev=stddev * backend.world_size
        ),
        raising=False,
    )


def noise_before_the_sum(backend, patch) -> None:
    """Each rank adds the same noise to its sum, and the sums are added up."""
    original = backend.add_noise

    def twice(*arguments, **named):
        return original(*arguments, **named) * backend.world_size

    patch.setattr(backend, "add_noise", twice, raising=False)


def noise_of_this_rank(backend, patch) -> None:
    original = backend.add_noise
    patch.setattr(
        backend,
        "add_noise",
        lambda total, layout, noise, **named: original(
            total, layout, StepNoise(SecretKey(noise.key.derive("rank", backend.rank))), **named
        ),
        raising=False,
    )


def noise_of_another_part(backend, patch) -> None:
    """Every rank draws from the first coordinate on: equal noise on different parts."""

    def first(total, layout, **named):
        return noised_vector(total, type(layout)(layout.parameters), **named)

    patch.setattr(base, "noised_vector", first)


def mean(backend, patch) -> None:
    original = backend.reduce_total
    patch.setattr(backend, "reduce_total", lambda total: original(total) // backend.world_size, raising=False)


def mean_over_rows(backend, patch) -> None:
    """The framework averages where it should add: invisible once the unit is clipped."""
    original = shards.ArrivingShards.collecting

    @contextlib.contextmanager
    def averaged(self, sink):
        with original(self, lambda slot, part: sink(slot, part / self.size)):
            yield

    patch.setattr(shards.ArrivingShards, "collecting", averaged)


def mean_of_contributions(backend, patch) -> None:
    """The same where ranks hand each other the clipped sums of their own units."""
    original = shards.reduce_scatter_flat

    def averaged(mine, vector, group=None):
        original(mine, vector, group)
        if mine.dtype == torch.int64:
            mine //= backend.world_size

    patch.setattr(shards, "reduce_scatter_flat", averaged)


def one_layer_unclipped(backend, patch) -> None:
    original = styles.factors

    def skipping(style, norms, clipping_norm):
        return torch.cat([original(style, norms, clipping_norm)])

    def groups(style, layout):
        # One tensor gets a factor of its own, which is always 1.
        return [0] * (len(layout.slots) - 1) + [1]

    patch.setattr(styles, "groups", groups)
    patch.setattr(
        styles,
        "factors",
        lambda style, norms, clipping_norm: torch.cat(
            [skipping(style, norms[:1], clipping_norm), torch.ones_like(norms[1:])]
        ),
    )


def no_hook(backend, patch) -> None:
    """What the clipper relies on to see gradients is gone, as a renamed method of a framework would be."""
    patch.setattr(capture, "_Capture", None)
    patch.setattr(clipper, "captured", lambda modules, parameters, num_rows, sink: contextlib.nullcontext())
    patch.setattr(shards.ArrivingShards, "_arrived", lambda self, slot, tensor: setattr(tensor, "grad", None))


def frozen(backend, patch) -> None:
    original = backend.place

    def place(model):
        placement = original(model)
        next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
        return placement

    patch.setattr(backend, "place", place, raising=False)


def one_factor_for_all(backend, patch) -> None:
    patch.setattr(styles, "factors", factors_of_the_first_unit)


def not_finite_counts(backend, patch) -> None:
    patch.setattr(styles, "factors", factors_for_what_is_not_finite)


def no_reset(backend, patch) -> None:
    for kind in (clipper.PerUnitClipper, cooperative.CooperativeClipper):
        patch.setattr(kind, "reset", forgets_to_clear)


def wrong_sensitivity(backend, patch) -> None:
    for kind in (clipper.PerUnitClipper, cooperative.CooperativeClipper):
        patch.setattr(kind, "sensitivity", 1e-6)


def coupled_rows(backend, patch) -> None:
    original = backend.place

    def place(model):
        couple_rows_in_training(model)
        return original(model)

    patch.setattr(backend, "place", place, raising=False)


def keeps_state(backend, patch) -> None:
    def remember(module, inputs, output):
        module.longest = max(getattr(module, "longest", 0), output.shape[1])

    hook_first_mlp(backend, patch, remember)


def looks_ahead(backend, patch) -> None:
    hook_first_mlp(backend, patch, lambda module, inputs, output: output + 0.1 * output.roll(-1, dims=1))


def hook_first_mlp(backend, patch, hook) -> None:
    original = backend.place

    def place(model):
        next(m for name, m in model.named_modules() if name.endswith("layers.0.mlp")).register_forward_hook(hook)
        return original(model)

    patch.setattr(backend, "place", place, raising=False)


def none(backend, patch) -> None:
    pass


EVERYWHERE = {
    none: "passed",
    noise_of_world_size: "noise",  # its spread; in a tensor of few coordinates the values themselves
    noise_before_the_sum: "noise",
    noise_of_this_rank: "ranks drew different noise",
    mean: "is off by",
    one_layer_unclipped: "above clipping_norm",
    no_hook: "",  # or it falls back to the route that needs none
    frozen: "frozen but listed",
}
NAMES = ("ddp", *SHARDED)
METHODS = ("lora", "full")
#: Each on every backend, with a method in turn; the honest one with both.
MUTANTS = [
    (name, method, mutant, message)
    for name in NAMES
    for number, (mutant, message) in enumerate(EVERYWHERE.items())
    for method in (METHODS if mutant is none else METHODS[number % 2 :][:1])
]
WITH_THE_OTHER_METHOD = [
    (name, method, mutant, message)
    for name in NAMES
    for method in METHODS
    for mutant, message in EVERYWHERE.items()
    if (name, method, mutant, message) not in MUTANTS
]
MUTANTS += [(name, "full", mean_over_rows, "is off by") for name in ("zero2", "zero3", "fsdp2")]
MUTANTS += [(name, "full", mean_of_contributions, "is off by") for name in ("zero2", "zero3", "fsdp2")]
MUTANTS += [(name, "full", noise_of_another_part, "of another part") for name in ("ddp", *SHARDED)]
MUTANTS += [
    *[
        (name, "lora", mutant, message)
        for name in ("zero3", "fsdp2")
        for mutant, message in {one_factor_for_all: "is off by", coupled_rows: "rows of a batch are mixed"}.items()
    ],
    *[
        (name, method, mutant, message)
        for name in ("zero3", "fsdp2")
        for method, mutant, message in (
            ("lora", keeps_state, "a pass over the model changes"),
            ("full", keeps_state, "a pass over the model changes"),
            ("full", looks_ahead, "is not causal"),
        )
    ],
    *[(name, "full", not_finite_counts, "above clipping_norm") for name in ("zero3", "fsdp2")],
    *[(name, "full", no_reset, "above clipping_norm") for name in ("zero3", "fsdp2")],
    *[(name, "full", wrong_sensitivity, "noise has standard deviation") for name in ("zero3", "fsdp2")],
]


def outcomes(directory, mutants) -> list[str]:
    found = []
    for name, method, mutant, _ in mutants:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            backend = make_backend(name)
            mutant(backend, patch)
            # On "auto", what fails under hooks is clipped one unit at a time, exactly.
            route = "batched" if mutant is no_hook and (method == "lora" or name == "ddp") else "auto"
            trainer = make_trainer(backend, directory, dataclasses.replace(LORA, method=method, route=route))
            try:
                found.append(f"passed on {self_test(trainer)}")
            except Exception as error:  # noqa: BLE001 - the test looks at its kind
                found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "planned"),
    [
        *[pytest.param(name, MUTANTS, marks=pytest.mark.campaign if name == "zero1" else ()) for name in NAMES],
        *[pytest.param(name, WITH_THE_OTHER_METHOD, marks=pytest.mark.campaign) for name in NAMES],
    ],
    ids=[*NAMES, *(f"{name}-other" for name in NAMES)],
)
def test_mutants_on_two_ranks(tiny_llama, name, planned, method):
    mutants = [mutant for mutant in planned if mutant[:2] == (name, method)]
    survivors = []
    for by_mutant in run_on_ranks(2, outcomes, tiny_llama, mutants):
        for (_, _, mutant, message), outcome in zip(mutants, by_mutant, strict=True):
            has_passed = outcome.startswith("passed")
            is_right = has_passed if mutant is none else not has_passed and message in outcome
            is_right |= mutant is no_hook and outcome == "passed on one_unit"
            if not is_right and "another rank" not in outcome:
                survivors.append((mutant.__name__, outcome))
    assert not survivors


def _different_start(directory) -> str:
    backend = make_backend("ddp")
    trainer = make_trainer(backend, directory, LORA)
    with torch.no_grad():
        next(iter(trainer.layout.parameters.values())).add_(1e-3 * backend.rank)
    try:
        self_test(trainer)
    except SelfTestFailed as error:
        return str(error)
    return "passed"


@pytest.mark.dist
def test_mutant_ranks_start_apart(tiny_llama):
    assert all("different trainable parameters" in outcome for outcome in run_on_ranks(2, _different_start, tiny_llama))


def _route_without_a_rule(directory, names) -> list[str]:
    """A rule that gives nothing is seen only where there are units; training goes on after the self-test."""
    routes = []
    for name in names:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setitem(rules._RULES, torch.nn.Linear, lambda *_: {})
            trainer = make_trainer(make_backend(name), directory, LORA)
            trainer.clipper.route = self_test(trainer)
            trainer.train_step(0)
        routes.append(trainer.clipper.route)
    return routes


@pytest.mark.dist
def test_the_route_that_passed_is_that_of_all_ranks(tiny_llama):
    """Else a rank with units would run more passes over a sharded base than one without, which waits for ever."""
    for routes in run_on_ranks(2, _route_without_a_rule, tiny_llama, ["ddp", "fsdp2", "zero3"]):
        assert routes == ["one_unit"] * 3
