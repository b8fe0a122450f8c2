"""Lines: whole units in rows of constant length add what each adds alone, bit for bit, and what autograd says."""

from __future__ import annotations

import copy
import dataclasses

import hypothesis
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from hypothesis import strategies as st

from privtrain.clipping import PerUnitClipper, attention, exact_sum, lines
from privtrain.clipping.lines import LineClipper
from privtrain.data.lines import Line, LinePacker, default_num_tokens
from privtrain.data.microbatch import Packer
from privtrain.data.records import Record
from privtrain.errors import SelfTestFailed, UnsupportedLayer
from privtrain.models import losses
from privtrain.models.losses import row_losses, token_losses
from privtrain.privacy.layout import Layout
from privtrain.training import line_probe
from privtrain.training.probes import Probe
from privtrain.training.selftest import run_self_test
from tests.privtrain.models_for_tests import brute_force_sum, invented_users, relative_error
from tests.privtrain.test_parity import _SIZES, CAUSAL, ONLY_ONE_UNIT, build, reference_losses_of
from tests.privtrain.test_probes import trainer_of

#: Lines of two units or so, where a user of three records needs two; and of all units.
_SHORT, _LONG = LinePacker(32, 32, 8, 16, 0), LinePacker(128, 128, 8, 16, 0)
_PACKED = [name for name in CAUSAL if name not in ONLY_ONE_UNIT]


def make(model, layout, *, precision="fp32", **options) -> LineClipper:
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")

    def of_line(line):
        with autocast:
            return token_losses(model, line)

    def of_rows(ids, mask):
        with autocast:
            return row_losses(model, ids, mask)

    return LineClipper(of_line, model, layout, 0.3, of_rows, torch.device("cpu"), **options)


def total_of(clipper: LineClipper, units, packer: LinePacker) -> torch.Tensor:
    clipper.reset()
    for line in packer.pack(units, packer.num_batches(units)):
        clipper.accumulate(line)
    return clipper.finish().clone()


# Packing.

units_of_lengths = st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=6), max_size=12)


def _units(lengths) -> list[list[np.ndarray]]:
    return [[np.arange(1, n + 1) + 20 * (u + i) for i, n in enumerate(unit)] for u, unit in enumerate(lengths)]


@hypothesis.given(lengths=units_of_lengths, num_tokens=st.integers(16, 70), most=st.integers(1, 4))
def test_lines_keep_every_token_and_units_together(lengths, num_tokens, most):
    units, packer = _units(lengths), LinePacker(num_tokens, max(2, num_tokens // 2), most, 16, 0, multiple=4)
    found: dict[int, list[np.ndarray]] = {}
    weights: dict[int, float] = {}
    is_open = None
    for line in packer.pack(units, packer.num_batches(units) + 1):
        totals = [stop - first for first, stop in line.units]
        kind = next((kind for kind in packer.slots() if kind[0] == line.slot_tokens), (0, 0))
        shared = (packer.shared_length(kind[0]), *kind)
        if (line.num_tokens, line.slot_tokens, line.num_slots) != shared:
            assert len(totals) == line.num_slots == 1
            assert line.num_tokens == line.slot_tokens == packer.own_length(totals[0])
        assert max(totals, default=0) <= line.slot_tokens
        assert len(line.owners) <= min(most, line.num_slots)
        assert is_open in (None, line.owners[:1] and line.owners[0])
        is_open = line.owners[-1] if line.last_continues else None
        records = list(line.records)
        for owner, (first, stop) in zip(line.owners, line.units, strict=True):
            own = [r for r in records if first <= r[0] < stop]
            assert (own[0][0], own[-1][1]) == (first, stop)
            for a, b in own:
                found.setdefault(owner, []).append(line.input_ids[0, a:b].numpy())
                assert line.positions[0, a:b].tolist() == list(range(b - a))
                assert not line.target_mask[0, a]
            mask = line.target_mask[0, first:stop]
            weights[owner] = weights.get(owner, 0.0) + float(line.token_weight[0, first:stop][mask].sum())
        used = line.units[-1][1] if line.units else 0
        assert sum(b - a for a, b in line.records) == used
        assert not line.target_mask[0, used:].any()
        assert (line.token_weight[0, used:] == 0).all()
    assert is_open is None
    for u, unit in enumerate(units):
        assert len(found[u]) == len(unit)
        assert all(np.array_equal(a, b) for a, b in zip(found[u], unit, strict=True))
        assert weights[u] == pytest.approx(1.0 if any(len(r) > 1 for r in unit) else 0.0)


@hypothesis.given(lengths=units_of_lengths, others=units_of_lengths)
def test_shapes_and_cuts_of_a_unit_depend_on_it_alone(lengths, others):
    def cuts(units):
        found: dict[int, list[tuple[int, ...]]] = {}
        for line in _SHORT.pack(units, _SHORT.num_batches(units)):
            for owner, (first, stop) in zip(line.owners, line.units, strict=True):
                shape = line.num_tokens, line.num_slots, line.slot_tokens
                found.setdefault(owner, []).append((stop - first, *shape))
        return found

    alone, together = cuts(_units(lengths)), cuts([*_units(lengths), *_units(others)])
    assert all(together[u] == alone[u] for u in range(len(lengths)))


def test_length_of_a_line_follows_from_the_configuration():
    assert [default_num_tokens(n, 8) for n in (48, 128, 512, 1024, 2048, 8192)] == [384, 512, 1024, 2048, 2048, 8192]
    assert default_num_tokens(1024, 1) == 1024
    assert all(default_num_tokens(n, m) >= n for n in range(1, 300, 7) for m in (1, 2, 8))


def test_lines_of_short_records_are_nearly_full():
    rng = np.random.default_rng(0)
    units = [[np.ones(min(1024, 1 + int(rng.exponential(90))), int) for _ in range(4)] for _ in range(200)]
    packer = LinePacker.of(1024, 8, 0)
    lengths = [line.num_tokens for line in packer.pack(units, packer.num_batches(units))]
    assert sum(len(r) for unit in units for r in unit) > 0.95 * sum(lengths)


# Exactness.


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", _PACKED)
def test_sum_over_lines_equals_the_float64_loop(name, method):
    check_parity(name, method, invented_users(5, most_records=3, seed=3), ["flat"])


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.campaign) for n in _PACKED if n != "llama")]
)
def test_sum_over_lines_is_right_in_every_style(name, method):
    for most_records in (1, 3):
        users = invented_users(5, most_records=most_records, seed=4)
        check_parity(name, method, users, ["flat", "per_layer", "automatic"])


def check_parity(name: str, method: str, users, styles: list[str]) -> None:
    model, layout = build(name, method)
    double = copy.deepcopy(model).double()
    for style in styles:
        reference = brute_force_sum(
            double, Layout.of(double), users, 0.3, style=style, losses=reference_losses_of(name, double)
        )
        for route, packer in (("batched", _SHORT), ("batched", _LONG), ("two_pass", _SHORT)):
            clipper = make(model, layout, style=style, route=route)
            found = exact_sum.as_float32(total_of(clipper, users, packer), clipper.grid_exponent)
            assert relative_error(found, reference) < 1e-5, (style, route, packer)


def test_masked_tokens_are_not_learned():
    model, layout = build("llama", "lora")
    rng = np.random.default_rng(5)
    units = []
    for records in invented_users(4, most_records=3, seed=6):
        masks = [rng.random(len(tokens)) < 0.5 for tokens in records]
        for mask in masks:
            mask[0] = False
        units.append([Record(tokens, mask) for tokens, mask in zip(records, masks, strict=True)])
    clipper = make(model, layout)
    by_lines = total_of(clipper, units, _SHORT)
    clipper.reset()
    packer = Packer(4, 16, 0)
    for batch in packer.pack(units, packer.num_batches(units)):
        clipper.accumulate(batch)
    by_rows = clipper.finish().double()
    assert float((by_lines.double() - by_rows).norm() / by_rows.norm()) < 1e-5


def differs_among_mates(name: str, method: str, precision: str, num_packings: int, route: str = "auto") -> bool:
    """Whether a unit adds other bits in some random company than alone."""
    model, layout = build(name, method)
    clipper = make(model, layout, precision=precision, route=route)
    units = invented_users(9, most_records=3, seed=8)
    alone = [total_of(clipper, [unit], _LONG) for unit in units]
    rng = np.random.default_rng(0)
    for _ in range(num_packings):
        chosen = rng.permutation(len(units))[: rng.integers(2, len(units) + 1)]
        members = chosen[:4]  # what a line holds of the longest
        line = _LONG.arranged([units[u] for u in members])
        clipper.reset()
        clipper.accumulate(line)
        if not torch.equal(clipper.finish(), sum((alone[u] for u in members), torch.zeros_like(clipper.total))):
            return True
    return False


@pytest.mark.parametrize("units", [[], [[np.array([5])]], [[np.array([5])], [np.array([6])] * 2]])
def test_lines_without_anything_to_predict_add_nothing(units):
    """Of a rank without units in a step, too: where queries and values alone are trained, it uses none of them."""
    model = copy.deepcopy(build("llama", "lora")[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and ("q_proj" in name or "v_proj" in name))
    clipper = make(model, Layout.of(model))
    clipper.reset()
    lines = list(_SHORT.pack(units, _SHORT.num_batches(units) + 1))
    assert not lines[-1].owners
    for line in lines:
        clipper.accumulate(line)
    assert not clipper.finish().any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", _PACKED)
def test_units_add_the_same_bits_in_any_company(name, precision):
    assert not differs_among_mates(name, "lora", precision, 5)
    assert not differs_among_mates(name, "full", precision, 3)


@pytest.mark.parametrize("kept_share", [0.1, 0.45, 1.0, 2.0])
def test_what_is_let_go_does_not_depend_on_mates(kept_share, monkeypatch):
    monkeypatch.setattr("privtrain.clipping.clipper._KEPT_SHARE", kept_share)
    deferred = set()
    plan = lines.LinePasses._plan

    def watched(self, calls):
        plan(self, calls)
        deferred.add(self.deferred)

    monkeypatch.setattr(lines.LinePasses, "_plan", watched)
    assert not differs_among_mates("llama", "full", "fp32", 3, "two_pass")
    assert len(deferred) == 1


@pytest.mark.campaign
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["batched", "two_pass"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", _PACKED)
def test_units_add_the_same_bits_in_200_companies(name, method, route, precision):
    assert not differs_among_mates(name, method, precision, 200, route)


@pytest.mark.parametrize("route", ["batched", "two_pass"])
def test_a_unit_that_is_not_a_number_counts_as_zero(route):
    model, layout = build("llama", "full")
    clipper = make(model, layout, route=route)
    units = invented_users(4, most_records=2, seed=9)
    expected = total_of(clipper, [units[0], units[2], units[3]], _LONG)
    line = _LONG.arranged(units)
    weight = line.token_weight.clone()
    weight[:, slice(*line.units[1])] = float("nan")
    clipper.reset()
    clipper.accumulate(dataclasses.replace(line, token_weight=weight))
    assert torch.equal(clipper.finish(), expected)
    assert clipper.diagnostics.nonfinite_owners == [1]


def _with_own_records(whole):
    """Return ``Line.only`` without the records of the others."""

    def only(line, members):
        found = whole(line, members)
        return dataclasses.replace(
            found, records=tuple(r for r in line.records if any(a <= r[0] < b for a, b in found.units))
        )

    return only


@pytest.mark.parametrize("is_planted", [False, True])
def test_units_beside_a_nan_keep_their_random_numbers(is_planted, monkeypatch):
    if is_planted:
        monkeypatch.setattr(Line, "only", _with_own_records(Line.only))
    torch.manual_seed(0)
    config = CAUSAL["gpt2"]()
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.1
    model = hf.AutoModelForCausalLM.from_config(config).train()
    clipper = make(model, Layout.of(model))
    line = _LONG.arranged(invented_users(4, most_records=2, seed=9))
    sums = []
    for value in (0.0, float("nan")):
        weight = line.token_weight.clone()
        weight[:, slice(*line.units[0])] = value
        clipper.reset()
        torch.manual_seed(7)
        clipper.accumulate(dataclasses.replace(line, token_weight=weight))
        sums.append(clipper.finish().clone())
    assert clipper.diagnostics.nonfinite_owners == [0]
    assert torch.equal(*sums) != is_planted


def test_rows_keep_their_bits_under_a_clipper_of_lines():
    model, layout = build("qwen3", "lora")
    ours, users, packer = make(model, layout), invented_users(5, most_records=3), Packer(4, 16, 0)
    plain = PerUnitClipper(model, layout, 0.3, lambda i, m: row_losses(model, i, m), torch.device("cpu"))
    for clipper in (ours, plain):
        clipper.reset()
        for batch in packer.pack(users, packer.num_batches(users)):
            clipper.accumulate(batch)
    assert torch.equal(ours.finish(), plain.finish())


def test_checkpointed_layers_attend_within_records_again():
    model, layout = build("llama", "full")
    users = invented_users(4, most_records=3, seed=2)
    expected = total_of(make(model, layout), users, _LONG)
    checkpointed = copy.deepcopy(model)
    assert isinstance(checkpointed, hf.PreTrainedModel)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    layout = Layout.of(checkpointed)
    for route in ("batched", "two_pass"):
        clipper = make(checkpointed, layout, route=route)
        found = total_of(clipper, users, _LONG)
        assert float((found - expected).double().norm() / expected.double().norm()) < 1e-5


# The self-test decides, and finds planted faults.


def probed(name: str, **options):
    torch.manual_seed(0)
    return after_self_test(hf.AutoModelForCausalLM.from_config(CAUSAL[name]()), **options)


def after_self_test(model, *, precision="fp32", **options):
    trainer = trainer_of(model, precision=precision, **options)
    trainer.line_packer = LinePacker.of(trainer.packer.max_length, 8, 0)
    trainer.clipper = trainer.new_clipper(trainer.row_losses, "auto")
    run_self_test(trainer, vocabulary_size=200, precision=precision)
    return trainer


@pytest.mark.parametrize(("name", "precision"), [("llama", "bf16"), ("gemma3", "fp32"), ("gpt2", "fp32")])
def test_models_of_plain_attention_are_packed(name, precision):
    trainer = probed(name, precision=precision)
    assert (trainer.packs_lines, trainer.why_rows) == (True, "")


_OTHERS = {
    "biases of attention by position": lambda: hf.BloomConfig(vocab_size=256, hidden_size=16, n_layer=2, n_head=2),
    "tokens without rows": CAUSAL["opt"],
    "a recurrent layer": lambda: hf.Qwen3NextConfig(
        **_SIZES, num_experts=0, layer_types=["linear_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("kind", _OTHERS)
def test_models_that_cannot_be_packed_keep_rows(kind):
    torch.manual_seed(0)
    trainer = after_self_test(hf.AutoModelForCausalLM.from_config(_OTHERS[kind]()))
    assert not trainer.packs_lines
    assert trainer.why_rows


def _leaky(records, num_tokens):
    return [attention._Piece(0, num_tokens, is_record=True)]


def _unreset(line):
    place = torch.arange(line.num_tokens)[None]
    return dataclasses.replace(line, positions=place)


def _plant(fault: str, patch: pytest.MonkeyPatch) -> None:
    right, slots, gradients = losses.token_losses, lines.Slots.__init__, lines.LinePasses._gradients_of
    if fault == "attention across records":
        patch.setattr(attention, "_pieces", _leaky)
    elif fault == "positions of the line":
        patch.setattr(losses, "token_losses", lambda model, line, head: right(model, _unreset(line), head))
    elif fault == "window of attention forgotten":
        mask = attention._Spans.mask
        patch.setattr(attention._Spans, "mask", lambda self, n, _window, query: mask(self, n, None, query))
    elif fault == "bits by place":
        place = lambda line: 1 + 1e-6 * torch.arange(line.num_tokens) / line.num_tokens  # noqa: E731
        patch.setattr(losses, "token_losses", lambda model, line, head: right(model, line, head) * place(line))
    elif fault == "bits at the end":
        end = lambda line: 1 + 1e-6 * (torch.arange(line.num_tokens) >= line.num_tokens - 4)  # noqa: E731
        patch.setattr(losses, "token_losses", lambda model, line, head: right(model, line, head) * end(line))
    elif fault == "bits by mates":
        mates = lambda line: 1 + 1e-6 * len(line.units)  # noqa: E731
        patch.setattr(losses, "token_losses", lambda model, line, head: right(model, line, head) * mates(line))
    elif fault == "bounds of units":
        # By two tokens: a unit's last one predicts nothing, so that a shift by one would change nothing.
        patch.setattr(lines.Slots, "__init__", lambda self, line, device: slots(self, _shifted(line), device))
    elif fault == "another unit's tokens behind":
        rows = lines.Slots.rows
        patch.setattr(
            lines.Slots, "rows", lambda self, tokens, is_zero_beyond: rows(self, tokens, is_zero_beyond=False)
        )
    elif fault == "a gradient too short":
        half = lambda self, *a: {k: _halved(g) for k, g in gradients(self, *a).items()}  # noqa: E731
        patch.setattr(lines.LinePasses, "_gradients_of", half)
    else:
        raise AssertionError(fault)


def _shifted(line):
    return dataclasses.replace(line, units=tuple((max(0, first - 2), stop - 2) for first, stop in line.units))


def _halved(gradient):
    return dataclasses.replace(gradient, left=gradient.left / 2) if hasattr(gradient, "left") else gradient / 2


@pytest.mark.parametrize(
    "fault",
    [
        "attention across records",
        "positions of the line",
        "window of attention forgotten",
        "bits by place",
        "bits at the end",
        "bits by mates",
        "bounds of units",
        "another unit's tokens behind",
        "a gradient too short",
    ],
)
def test_planted_faults_of_lines_send_records_to_rows(fault, monkeypatch):
    _plant(fault, monkeypatch)
    trainer = probed("mistral")
    assert not trainer.packs_lines
    assert trainer.why_rows


@pytest.mark.parametrize("num_heads", [1, 5, 13])
def test_random_numbers_shared_by_a_line_send_records_to_rows(num_heads):
    class Coin(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, **kwargs):
            # One for each row, as stochastic depth, or several of a number that the probe's line may have as a size.
            keep = (torch.rand(x.shape[0], num_heads, 1) < 0.9).float().mean(dim=1, keepdim=True)
            return self.layer(x * keep if self.training else x, **kwargs)

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CAUSAL["llama"]())
    model.model.layers[1].mlp = Coin(model.model.layers[1].mlp)
    probe = line_probe.LineProbe(packed_trainer(model), 200, "fp32", "auto")
    assert "random numbers" in probe.shared_coins()


@pytest.mark.parametrize("is_hidden", [False, True])
def test_what_only_the_longest_line_leaves_is_found(is_hidden):
    hidden = torch.zeros(())

    class Grown(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.scale = layer, 1.0

        def forward(self, x, **kwargs):
            if x.shape[1] > 200:  # of the lines that the probe shares, none is so long
                (hidden.fill_(1) if is_hidden else setattr(self, "scale", 1.001))
            return self.layer(x * (self.scale + 1e-3 * float(hidden)), **kwargs)

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CAUSAL["llama"]())
    model.model.layers[1].mlp = Grown(model.model.layers[1].mlp)
    trainer = trainer_of(model)
    trainer.line_packer = LinePacker(256, 128, 8, trainer.packer.max_length, 0)
    trainer.clipper = trainer.new_clipper(trainer.row_losses, "auto")
    if is_hidden:
        run_self_test(trainer, vocabulary_size=200, precision="fp32")
        assert "longest line" in trainer.why_rows
    else:
        with pytest.raises(SelfTestFailed, match=r"scale.*performance\.packing: rows"):
            run_self_test(trainer, vocabulary_size=200, precision="fp32")


def test_a_probe_whose_loud_units_are_not_finite_proves_nothing():
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CAUSAL["llama"]())
    overflow = lambda x: torch.where(x.abs() > 100, torch.inf, x)  # noqa: E731 - no ordinary activation is so large
    model.model.layers[0].register_forward_pre_hook(lambda _module, inputs: (overflow(inputs[0]), *inputs[1:]))
    probe = line_probe.LineProbe(packed_trainer(model), 200, "fp32", "auto")
    assert "not finite" in probe.why_rows()


def packed_trainer(model):
    trainer = trainer_of(model)
    trainer.line_packer = LinePacker.of(trainer.packer.max_length, 8, 0)
    trainer.clipper = trainer.new_clipper(trainer.row_losses, "auto")
    return trainer


def test_ranks_are_compared_in_every_kind_of_line():
    """Also in slots of units of several records, which are longer than the longest record."""
    trainer = packed_trainer(hf.AutoModelForCausalLM.from_config(CAUSAL["llama"]()))
    trainer.packs_lines, packer = True, trainer.line_packer
    assert packer.max_length < packer.slots()[0][0]
    shapes = [batch for batch in Probe(trainer, 200)._of_every_shape() if isinstance(batch, Line)]
    assert {line.slot_tokens for line in shapes} >= {tokens for tokens, _ in packer.slots()}
    assert packer.slots()[0][0] in {stop - first for line in shapes for first, stop in line.units}


def test_attention_within_records_is_off_outside_of_lines():
    model, layout = build("llama", "lora")
    assert isinstance(model, peft.PeftModel)
    base = model.get_base_model()
    assert isinstance(base, hf.PreTrainedModel)
    before = base.config._attn_implementation
    line = _LONG.arranged(invented_users(2, most_records=1))
    with pytest.raises(RuntimeError, match="planted"), attention.within_records(model, line):
        raise RuntimeError("planted")
    assert base.config._attn_implementation == before
    make(model, layout).refuse_lines()
    with pytest.raises(UnsupportedLayer, match="does not call"), attention.within_records(model, line):
        pass
