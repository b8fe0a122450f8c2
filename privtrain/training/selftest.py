"""The start-up self-test: on the real model and process group, before any private row is touched.

It does not trust the clipper, the reduction or the noise: what the job's own code does is compared with another way to
the same result. All of it runs in training mode, as every step does. Any doubt stops the job.

Its parts: what is trained is what is clipped and stepped (here); the model keeps nothing and mixes no rows
(:mod:`.probes`) or tokens of a line (:mod:`.line_probe`), and looks at no token ahead (:mod:`.causality_probe`);
clipping and reduction (:mod:`.clipping_check`); noise (:mod:`.noise_check`).

Of ``placement``, ``clipped`` is the layout of the tensors whose clipped sum this rank accumulates, ``stepped`` that of
the tensors, or parts of them, that its optimizer steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from privtrain.backends import Backend, Placement
from privtrain.clipping import PerUnitClipper
from privtrain.data.records import Record
from privtrain.errors import SelfTestFailed
from privtrain.privacy.layout import Layout, Slot
from privtrain.privacy.secret import SecretKey
from privtrain.training.agreement import agree_on_fault
from privtrain.training.causality_probe import CausalityProbe
from privtrain.training.clipping_check import check_clipping, check_exact_sum, planted_units
from privtrain.training.line_probe import LineProbe
from privtrain.training.noise_check import check_noise
from privtrain.training.probes import Probe
from privtrain.training.trainer import Trainer

#: Sums over coordinates are taken modulo this prime, so that they are exact in int64 for tensors of any size.
_PRIME = 2**31 - 1

#: A dropout rate above zero at which nothing is dropped and nothing scaled: 1 less this is 1.
_NO_DROPOUT = 1e-30


def run_self_test(trainer: Trainer, *, vocabulary_size: int, precision: str) -> str:
    """Check coverage, clipping, reduction, noise and agreement of the ranks.

    An adapter is moved to a random point for the test (a fresh LoRA has zero gradients in half of its tensors) and
    moved back bit by bit. Every rank calls it, and on a failure of any, all fail.

    Args:
        trainer: about to train. Its model, clipper factory, losses, reduction and noise are tested.
        vocabulary_size: planted tokens are below this.
        precision: of forward and backward, ``"fp32"`` or ``"bf16"``.

    Returns:
        The clipping route that passed, the same on every rank: ``"one_unit"`` where ``"auto"`` found a layer that
        needs it. Train on that one.

    Raises:
        SelfTestFailed: naming the check and the tensor or setting.
    """
    model, placement, backend = trainer.model, trainer.placement, trainer.backend
    if not backend.parameters_agree(model):
        raise SelfTestFailed("ranks start with different trainable parameters; check that all load the same base model")
    _check_coverage(model, placement, backend)
    # Sharded trained tensors are the model's own weights, whose gradients are not zero at the start.
    is_adapter = placement.shards is None
    layout = placement.stepped
    before = {name: p.detach().clone() for name, p in layout.parameters.items()} if is_adapter else {}
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        if is_adapter:
            _move(layout, backend)
        units = [[trainer.objective.plant(tokens) for tokens in unit] for unit in planted_units(vocabulary_size)]
        probe = Probe(trainer, vocabulary_size)
        probe.check_config()
        clipper = _check_probes(trainer, probe, units, precision)
        check_noise(trainer, clipper)
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, value in before.items():
                layout.parameters[name].copy_(value)
        if is_adapter:
            for parameter in placement.clipped.parameters.values():
                parameter.grad = None
            backend.publish()
    return clipper.route


def _check_probes(trainer: Trainer, probe: Probe, units: list[list[Record]], precision: str) -> PerUnitClipper:
    """Probe the model (:mod:`.probes`), and check clipping on the route that the probes allow.

    Also decide whether units are packed into lines, and note that in the trainer.

    Args:
        trainer: about to train.
        probe: of that trainer.
        units: the three planted units, as records.
        precision: of forward and backward, ``"fp32"`` or ``"bf16"``.

    Returns:
        The clipper that passed, on that route.
    """
    with _without_dropout(trainer.model):
        state = probe.check_traces()
    probe.check_coins()
    with _without_dropout(trainer.model):
        probe.check_rows(every_width=trainer.line_packer is None)
        CausalityProbe(trainer, probe.vocabulary_size).check()
        clipper = check_clipping(trainer, units, precision, trainer.clipper.route)
    _choose_packing(trainer, LineProbe(trainer, probe.vocabulary_size, precision, clipper.route))
    with _without_dropout(trainer.model):
        if not trainer.packs_lines:
            clipper = _check_rows(trainer, probe, units, precision, clipper)
        check_exact_sum(clipper, trainer, units)
        probe.check_ranks(clipper.route)
        # Lines may be longer than any row that was tried before.
        probe.check_unchanged(state, "" if trainer.line_packer is None else "; or set performance.packing: rows")
    return clipper


def _choose_packing(trainer: Trainer, probe: LineProbe) -> None:
    """Pack units into lines where the configuration allows it and the probe proves that they are exact."""
    if trainer.line_packer is None:
        return
    with _without_dropout(trainer.model):
        reason_for_rows = probe.why_rows()
    if not reason_for_rows:  # with dropout: whether one random number serves several tokens of a line
        reason_for_rows = probe.shared_coins()
    trainer.why_rows = reason_for_rows
    trainer.packs_lines = not reason_for_rows


def _check_rows(
    trainer: Trainer, probe: Probe, units: list[list[Record]], precision: str, clipper: PerUnitClipper
) -> PerUnitClipper:
    """Demand that units are independent in the job's own rows; return a clipper of the route on which they are."""
    if trainer.line_packer is not None:
        probe.check_rows()
    route = probe.independent_route(clipper.route)
    return clipper if route == clipper.route else check_clipping(trainer, units, precision, route)


def _move(layout: Layout, backend: Backend) -> None:
    """Add fixed random changes to every trained tensor: a LoRA B of zeros would leave A without gradient."""
    key = SecretKey.insecure(0, "self-test")
    with torch.no_grad():
        for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
            nudge = _nudge(key, slot)
            parameter.add_(nudge.view(slot.shape).to(parameter))
    backend.publish()


def _nudge(key: SecretKey, slot: Slot) -> torch.Tensor:
    """Return [coordinates] small random changes of this rank's part of a tensor.

    A coordinate's change is the same however the tensor is divided over ranks: all before it are drawn and dropped.
    """
    stop = slot.first + slot.num_coordinates
    numbers = key.stream("nudge", slot.name).standard_normal(stop)[slot.first :]
    return torch.from_numpy(numbers * 0.02)


@contextlib.contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Let all dropout drop nothing in the block, also what a module or its config keeps as a number.

    The rate is not set to zero, where models and kernels take another way than in training: with dropout, torch's
    attention on a CPU runs another kernel. The model stays in training mode: in ``eval()`` transformers does not
    checkpoint gradients, as training may.
    """
    rates = _dropout_rates(model)
    try:
        for owner, name, _ in rates:
            setattr(owner, name, _NO_DROPOUT)
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def _dropout_rates(model: torch.nn.Module) -> list[tuple[object, str, float]]:
    """Return (owner, attribute, rate) of every positive dropout rate in the modules and their configs."""
    owners: dict[int, object] = {}  # by id, so that a config that several modules share is looked at once
    for module in model.modules():
        owners[id(module)] = module
        config = getattr(module, "config", None)
        if config is not None:
            owners[id(config)] = config
    rates: list[tuple[object, str, float]] = []
    for owner in owners.values():
        is_dropout = "dropout" in type(owner).__name__.lower()
        for name, value in getattr(owner, "__dict__", {}).items():
            is_rate = "drop" in name or (is_dropout and name == "p")  # torch's Dropout calls its rate p
            if is_rate and isinstance(value, float) and value > 0:
                rates.append((owner, name, value))
    return rates


def _check_coverage(model: torch.nn.Module, placement: Placement, backend: Backend) -> None:
    """Check that what is trained is clipped and stepped, and that the parts which ranks step make up whole tensors.

    The second by power sums: over the ranks that hold the parts of one copy of the tensors, the number of coordinates
    stepped, the sum of their indices and the sum of the indices' squares must be those of whole tensors.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    stray = trained.symmetric_difference(placement.clipped.parameters)
    stray |= trained.symmetric_difference(placement.stepped.parameters)
    fault = ""
    if stray:
        fault = (
            f"tensors {sorted(stray)[:3]} are frozen but listed as trained, or trained but not listed; something "
            "changed requires_grad after the model was made"
        )
    agree_on_fault(fault, backend)
    slots = placement.stepped.slots
    own_sums = []  # of the coordinates that this rank steps, from slot.first on: [tensors][powers]
    for slot in slots:
        below_first = _power_sums(slot.first)
        below_stop = _power_sums(slot.first + slot.num_coordinates)
        own_sums.append([(stop - first) % _PRIME for first, stop in zip(below_first, below_stop, strict=True)])
    sums = torch.tensor(own_sums, dtype=torch.int64, device=backend.device)
    backend.sum_parts(sums)
    faults = []
    for slot, over_ranks in zip(slots, sums.tolist(), strict=True):
        of_whole = _power_sums(slot.num_whole_coordinates)
        if [value % _PRIME for value in over_ranks] != [value % _PRIME for value in of_whole]:
            faults.append(f"tensor {slot.name!r}: the parts of the ranks do not add up to it; report this")
    agree_on_fault(faults[0] if faults else "", backend)


def _power_sums(stop: int) -> tuple[int, int, int]:
    """Return the sums of the 0th, 1st and 2nd powers of the coordinates below ``stop``."""
    return stop, stop * (stop - 1) // 2, stop * (stop - 1) * (2 * stop - 1) // 6
