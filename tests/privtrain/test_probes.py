"""The start-up probes: models whose passes leave traces, mix rows or toss coins for a batch do not begin to train."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from privtrain.backends import DdpBackend, LocalBackend
from privtrain.clipping import PerUnitClipper
from privtrain.config.model import LoraSection
from privtrain.config.training import TrainingSection
from privtrain.data.microbatch import Packer
from privtrain.data.records import Record
from privtrain.data.units import UnitData
from privtrain.errors import SelfTestFailed, UnsupportedLayer
from privtrain.ledger.log import NullLedger
from privtrain.models.losses import CausalLM, Classification, _LabelledRows, label_logits
from privtrain.models.trainable import add_lora
from privtrain.privacy.secret import SecretKey
from privtrain.tracking import NullTracker
from privtrain.training import selftest, traces
from privtrain.training.probes import Probe
from privtrain.training.selftest import run_self_test
from privtrain.training.trainer import Trainer
from tests.privtrain.cells import Cell
from tests.privtrain.models_for_tests import invented_users
from tests.privtrain.test_parity import _SIZES, CAUSAL, CLASSIFIERS
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def trainer_of(
    model, *, route="auto", precision="fp32", max_length=32, microbatch_size=3, objective=None, backend=None
) -> Trainer:
    """A trainer of a default adapter on every linear layer of ``model``."""
    is_classifier = isinstance(objective, Classification)
    adapted = add_lora(
        copy.deepcopy(model).requires_grad_(False),
        LoraSection(rank=2, alpha=4),
        init_seed=0,
        public_name="tiny",
        is_classifier=is_classifier,
    )
    users = tuple(map(tuple, invented_users(7, most_records=4)))
    return Trainer(
        plan=Cell(noise_multiplier=1.3).plan,
        training=TrainingSection(),
        model=adapted.train(),
        units=UnitData(tuple(f"user-{i}" for i in range(7)), users, 0),
        backend=backend or LocalBackend(CPU),
        key=SecretKey.insecure(5, "probes"),
        generation=0,
        ledger=NullLedger(),
        tracker=NullTracker(),
        autocast=torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        packer=Packer(microbatch_size, max_length=max_length, pad_id=0),
        clipping_route=route,
        objective=objective or CausalLM(),
    )


def start(model, *, precision="fp32", **options) -> str:
    """The route that the self-test passes."""
    return run_self_test(trainer_of(model, precision=precision, **options), vocabulary_size=200, precision=precision)


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**_SIZES, **changes}))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *[(name, "bf16") for name in (*CAUSAL, *CLASSIFIERS)],
        *[(name, "fp32") for name in ("llama", "gemma3", "roberta")],
        *[
            pytest.param(name, "fp32", marks=pytest.mark.campaign)
            for name in (*CAUSAL, *CLASSIFIERS)
            if name not in ("llama", "gemma3", "roberta")
        ],
    ],
)
def test_default_adapter_starts_on_every_architecture(name, precision):
    torch.manual_seed(0)
    is_causal = name in CAUSAL
    kind = hf.AutoModelForCausalLM if is_causal else hf.AutoModelForSequenceClassification
    model = kind.from_config((CAUSAL if is_causal else CLASSIFIERS)[name]())
    objective = CausalLM() if is_causal else Classification(num_labels=3, pad_id=0, separator_id=None)
    route = start(model, precision=precision, objective=objective, max_length=16)
    assert route == ("one_unit" if name == "opt" else "auto")


# A forward pass leaves no trace.


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def forward(self, hidden):
        self.num_calls += 1
        return hidden


class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, hidden):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * hidden.mean())
        return hidden - self.mean


class LongestSeen(nn.Module):
    """Positions by the longest row so far, kept two containers deep."""

    def __init__(self):
        super().__init__()
        self.cache = {"positions": [torch.arange(1.0)]}

    def forward(self, hidden):
        if hidden.shape[1] > len(self.cache["positions"][0]):
            self.cache["positions"][0] = torch.arange(float(hidden.shape[1]))
        return hidden * (1 + 1e-3 / len(self.cache["positions"][0]))


class GrowingCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, hidden):
        self.seen.append(hidden.detach().mean())
        return hidden


class OfTheClass(nn.Module):
    loudest = 0.0

    def forward(self, hidden):
        OfTheClass.loudest = max(OfTheClass.loudest, float(hidden.abs().max()))
        return hidden


class FrozenWeightMoves(nn.Module):
    def __init__(self):
        super().__init__()
        self.load = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, hidden):
        self.load.data[0] += hidden.shape[1]
        return hidden


class Hidden(nn.Module):
    """A module in a list, which no parent registers."""

    def __init__(self):
        super().__init__()
        self.parts = (Counts(),)

    def forward(self, hidden):
        return self.parts[0](hidden)


def with_layer(layer: nn.Module) -> nn.Module:
    """A Llama whose first MLP's output goes through ``layer``."""
    model = llama()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, layer)
    return model


@pytest.mark.parametrize(
    "layer", [Counts, RunningMean, LongestSeen, GrowingCache, OfTheClass, FrozenWeightMoves, Hidden]
)
@pytest.mark.parametrize("route", ["auto", "one_unit"])
def test_module_that_keeps_state_is_refused_by_name(layer, route):
    OfTheClass.loudest = 0.0
    with pytest.raises(SelfTestFailed, match=r"a pass over the model changes .*layers\.0\.mlp"):
        start(with_layer(layer()), route=route)


def test_state_kept_in_a_closure_is_found_by_its_effect():
    model, seen = llama(), [1e-6]

    def remember(module, inputs, output):
        seen[0] = max(seen[0], float(output.detach().abs().max()))
        return output / seen[0]

    model.model.layers[0].register_forward_hook(remember)
    with pytest.raises(SelfTestFailed, match=r"changes what module .*layers\.0.*returns for the same row"):
        start(model)


class BuiltOnce(nn.Module):
    """A mask that is made when it is first needed, always the same."""

    def __init__(self):
        super().__init__()
        self.mask = None

    def forward(self, hidden):
        if self.mask is None:
            self.mask = torch.ones(hidden.shape[-1])
        return hidden * self.mask


def test_what_is_built_once_is_no_trace():
    assert start(with_layer(BuiltOnce())) == "auto"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rescaled_positions_need_the_original_context(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    model = llama(rope_parameters=rope, max_position_embeddings=64)
    assert start(model, max_length=64) == "auto"
    refusal = rf"rotary_emb.*rope_type: {kind}.*data.max_length: 64 or less"
    with pytest.raises(SelfTestFailed, match=refusal):
        start(model, max_length=80)
    for route in ("batched", "one_unit"):  # whoever drives the clipper alone is stopped too
        clipper = trainer_of(model, max_length=80, route=route).clipper
        packer = Packer(2, max_length=80, pad_id=0)
        (fits,) = packer.pack([[np.arange(3, 60)]], 1)
        clipper.accumulate(fits)
        (long,) = packer.pack([[np.arange(3, 80)]], 1)
        with pytest.raises(UnsupportedLayer, match=refusal):
            clipper.accumulate(long)


# Rows are independent.


class OverTheBatch(nn.Module):
    """Normalised over rows, without statistics of its own: in the spirit of a frozen batch norm."""

    def forward(self, hidden):
        return hidden / hidden.square().mean(dim=0, keepdim=True).sqrt().clamp(min=1e-3)


class RangeOfTheBatch(nn.Module):
    """Rounded to 8 bits over the range of all rows."""

    def forward(self, hidden):
        step = hidden.detach().abs().max() / 127
        return hidden + (torch.round(hidden / step) * step - hidden).detach()


@pytest.mark.parametrize("route", ["auto", "batched", "two_pass"])
def test_frozen_layer_that_mixes_rows_is_refused_by_name(route):
    with pytest.raises(SelfTestFailed, match=r"rows of a batch are mixed by .*of type OverTheBatch.*one_unit"):
        start(with_layer(OverTheBatch()), route=route)


def test_range_over_the_batch_is_refused():
    # Its range is over the tokens of a row too, so that what comes later is seen before.
    with pytest.raises(SelfTestFailed, match=r"rows of a batch are mixed|is off by|is not causal"):
        start(with_layer(RangeOfTheBatch()))


def test_one_unit_at_a_time_mixes_no_rows():
    assert start(with_layer(OverTheBatch()), route="one_unit") == "one_unit"


class RoundsByPlace(nn.Module):
    """As kernels do whose order of adding up depends on where a row lies: the last bits alone differ."""

    def forward(self, hidden):
        if hidden.shape[0] < 2:
            return hidden
        return torch.cat([hidden[:1], hidden[1:] * (1 + 2**-22)])


def test_rounding_by_place_falls_back_to_one_unit():
    model = with_layer(RoundsByPlace())
    trainer = trainer_of(model)
    assert run_self_test(trainer, vocabulary_size=200, precision="fp32") == "one_unit"
    assert "of type RoundsByPlace" in trainer.clipper.fallback_reason
    with pytest.raises(SelfTestFailed, match=r"in another row of the batch .*of type RoundsByPlace; set .*one_unit"):
        start(model, route="batched")


class RoundsMiddleRows(nn.Module):
    """Rounds every other row in a way of its own, as small products of a CPU library do: never the first or last."""

    def forward(self, x):
        place = torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1))
        return x * torch.where(place % 2 == 1, 1 + 1e-6, 1.0)


@pytest.mark.parametrize("route", ["auto", "batched"])
def test_rounding_of_rows_in_the_middle_is_found(route):
    if route == "auto":
        assert start(with_layer(RoundsMiddleRows()), microbatch_size=5) == "one_unit"
    else:
        with pytest.raises(SelfTestFailed, match="rounded by their place"):
            start(with_layer(RoundsMiddleRows()), microbatch_size=5, route=route)


def test_mutant_first_and_last_row_alone_are_compared(monkeypatch):
    monkeypatch.setattr(Probe, "_row_that_differs", lambda *_: "")
    assert start(with_layer(RoundsMiddleRows()), microbatch_size=5) == "auto"


class RoundsByRank(nn.Module):
    """What another machine, or MKL_CBWR on one of them, does: a rank rounds in a way of its own."""

    rank = 0

    def forward(self, hidden):
        return hidden * (1 + 1e-6 * self.rank)


def _started_on_a_rank(model, is_checked):
    """The route that the self-test passes or its error, and the sum of one unit in grid steps, on this rank."""
    if not is_checked:
        Probe.check_ranks = lambda *_: None  # in a process of its own
    backend = DdpBackend(CPU)
    RoundsByRank.rank = backend.rank
    trainer = trainer_of(model, backend=backend)
    try:
        outcome = run_self_test(trainer, vocabulary_size=200, precision="fp32")
    except SelfTestFailed as failure:
        outcome = str(failure)
    for batch in trainer.packer.pack([[np.arange(9)]], 1):
        trainer.clipper.accumulate(batch)
    return outcome, trainer.clipper.finish()


def test_ranks_that_round_otherwise_are_refused():
    """Which rank a unit runs on depends on the others: with one more, they would be rounded otherwise."""
    for outcome, _ in run_on_ranks(2, _started_on_a_rank, with_layer(RoundsByRank()), True):
        assert "ranks do not add the same bits to the sum for one unit" in outcome


def test_mutant_ranks_are_not_compared():
    """What was so once: rounding is below every tolerance, and the same unit adds other bits on another rank."""
    (first, here), (second, there) = run_on_ranks(2, _started_on_a_rank, with_layer(RoundsByRank()), False)
    assert first == second == "auto"
    assert not torch.equal(here, there)


def with_outliers() -> nn.Module:
    """A Llama that computes columns with an outlier anywhere in the batch otherwise, and overflows at loud rows."""
    model = llama()

    def columns(_module, inputs):
        is_outlier = inputs[0].abs().amax(dim=(0, 1)) > 5
        hidden = inputs[0] * torch.where(is_outlier, 1 + 1e-6, 1.0)
        return (torch.where(hidden.abs() > 50, torch.inf, hidden), *inputs[1:])

    model.model.layers[0].register_forward_pre_hook(columns)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 10.0  # what a unit may bring
    return model


def test_loud_rows_that_are_not_finite_prove_nothing():
    trainer = trainer_of(with_outliers())
    assert run_self_test(trainer, vocabulary_size=200, precision="fp32") == "one_unit"
    assert "rows of huge activations are not finite" in trainer.clipper.fallback_reason
    with pytest.raises(SelfTestFailed, match=r"not finite.*one_unit"):
        start(with_outliers(), route="batched")


def test_mutant_loud_rows_that_are_not_finite_count(monkeypatch):
    """What was so once: the clipper ran each unit by itself and found no difference, and training coupled units."""
    never = property(lambda _: 0, lambda _clipper, _value: None)
    monkeypatch.setattr(PerUnitClipper, "num_split", never, raising=False)
    trainer = trainer_of(with_outliers())
    trainer.clipper.settle(run_self_test(trainer, vocabulary_size=200, precision="fp32"))
    assert trainer.clipper.route == "auto"
    with torch.no_grad():
        for parameter in trainer.layout.parameters.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    units = [[np.arange(20, 30)], [np.arange(40, 50)], [np.full(10, 7)]]

    def added(members) -> torch.Tensor:
        trainer.clipper.reset()
        for batch in trainer.packer.pack(members, trainer.packer.num_batches(members)):
            trainer.clipper.accumulate(batch)
        return trainer.clipper.finish().clone()

    assert (added(units) - added(units[:2]) - added(units[2:])).count_nonzero() > 0


class RoundsWithDropout(RoundsMiddleRows):
    """Takes another way where there is dropout, as torch's attention on a CPU does."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return super().forward(self.dropout(x)) if self.dropout.p > 0 else x


def test_what_is_computed_with_dropout_alone_is_found():
    assert start(with_layer(RoundsWithDropout()), microbatch_size=5) == "one_unit"


def test_mutant_dropout_is_set_to_zero(monkeypatch):
    """What was so once: the kernels of the self-test were not those of training."""
    monkeypatch.setattr(selftest, "_NO_DROPOUT", 0.0)
    assert start(with_layer(RoundsWithDropout()), microbatch_size=5) == "auto"


class MasksTheLabelAlone(Classification):
    """Gives the model one place less: none is masked where all rows are full, and transformers drops the mask."""

    def _read(self, model, input_ids, target_mask):
        has_label = target_mask.any(dim=1)
        place = target_mask.int().argmax(dim=1, keepdim=True)
        labels = torch.where(has_label, input_ids.gather(1, place)[:, 0], 0)
        attended = torch.arange(input_ids.shape[1] - 1) < place.clamp(min=1)
        ids = torch.where(attended, input_ids[:, :-1], self.pad_id)
        return _LabelledRows(label_logits(model, ids, attended), labels, has_label)


def full_rows_moved(kind: type[Classification]) -> int:
    """How many coordinates the others of a batch of full rows change in as one unit leaves it."""
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(CLASSIFIERS["llama_classifier"]())
    objective = kind(num_labels=3, pad_id=0, separator_id=None)
    trainer = trainer_of(model, precision="bf16", objective=objective, max_length=16)
    with torch.no_grad():
        for parameter in trainer.layout.parameters.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    units = [[objective.plant(np.random.default_rng(seed).integers(3, 200, size=16))] for seed in range(3)]

    def added(members: list[list[Record]]) -> torch.Tensor:
        trainer.clipper.reset()
        for batch in trainer.packer.pack(members, trainer.packer.num_batches(members)):
            trainer.clipper.accumulate(batch)
        return trainer.clipper.finish().clone()

    return int((added(units) - added(units[:2]) - added(units[2:])).count_nonzero())


def test_a_full_row_adds_the_same_bits_beside_padding():
    assert full_rows_moved(Classification) == 0


def test_mutant_no_place_is_masked_in_full_rows():
    """What was so once: attention without a mask, or with one, by whether every row of the batch is full."""
    assert full_rows_moved(MasksTheLabelAlone) > 0


def test_attention_by_whether_others_have_padding_is_found():
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(CLASSIFIERS["llama_classifier"]())
    trainer = trainer_of(
        model, precision="bf16", objective=MasksTheLabelAlone(3, 0, None), max_length=16, microbatch_size=4
    )
    assert Probe(trainer, vocabulary_size=200).independent_route("auto") == "one_unit"
    assert "whether others have padding" in trainer.clipper.fallback_reason


class LetsNothingBack(torch.autograd.Function):
    """Rows are mixed in the backward pass alone."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] + 1e-6 * gradients[0].mean(dim=0, keepdim=True)


class MixesBackwards(nn.Module):
    def forward(self, hidden):
        return LetsNothingBack.apply(hidden)


# Random numbers.


def test_layer_drop_is_refused_by_its_key():
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        hf.OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=16, layerdrop=0.1)
    )
    with pytest.raises(SelfTestFailed, match=r"layerdrop: 0.1 .*set layerdrop: 0 in the model's config.json"):
        start(model)


class CoinOfTheBatch(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.dropped = 0.5  # a name that turning dropout off would turn off, too
        self.draw = draw

    def forward(self, hidden):
        return hidden * 0.5 if self.training and self.draw() < self.dropped else hidden


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()),
        lambda: torch.bernoulli(torch.tensor(0.5)) + 0.1,  # above the rate that stands for none
        lambda: torch.empty(1).uniform_(),
        lambda: torch.rand(5)[0],  # as many as rows of a probe
    ],
)
def test_coin_of_the_batch_is_refused_by_name(draw):
    with pytest.raises(SelfTestFailed, match="of type CoinOfTheBatch draws random numbers"):
        start(with_layer(CoinOfTheBatch(draw)))


class NumpyCoin(nn.Module):
    def forward(self, hidden):
        return hidden * (1 + 1e-9 * float(__import__("numpy").random.rand()))


def test_coin_of_numpy_is_refused():
    with pytest.raises(SelfTestFailed, match="random numbers of NumPy"):
        start(with_layer(NumpyCoin()))


def test_dropout_and_coins_without_effect_are_no_fault():
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.1))
    assert start(model, route="auto") == "one_unit"
    assert start(with_layer(nn.Dropout(0.2))) == "auto"


class DropsPositions(nn.Module):
    """As DeBERTa does: dropout on what all rows share, a weight itself."""

    def __init__(self, prob):
        super().__init__()
        self.positions = nn.Parameter(torch.full((16,), 0.1), requires_grad=False)
        self.dropout = nn.Dropout(prob)

    def forward(self, hidden):
        return hidden + self.dropout(self.positions)


def test_dropout_of_what_rows_share_is_a_coin_unless_off():
    model = with_layer(DropsPositions(0.0))
    assert start(model) == "auto"
    with pytest.raises(SelfTestFailed, match="of type Dropout draws random numbers"):
        start(with_layer(DropsPositions(0.1)))
    assert start(with_layer(DropsPositions(0.1)), route="one_unit") == "one_unit"


# Experts, and backward passes.


def tiny_experts(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "mixtral":
        config = hf.MixtralConfig(**{**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2})
        return hf.MixtralForCausalLM(config)
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 258}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    return hf.DbrxForCausalLM(
        hf.DbrxConfig(**sizes, ffn_config=experts, attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0})
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mixtral", "dbrx"])
def test_experts_start_one_unit_at_a_time(kind, seed):
    """Padding goes to experts too, and their number of tokens rounds the others; DBRX hides how many experts it has."""
    assert start(tiny_experts(kind, seed)) == "one_unit"


def test_mixing_in_the_backward_pass_is_found():
    with pytest.raises(SelfTestFailed, match=r"is off by|backward pass"):
        start(with_layer(MixesBackwards()), route="batched")


class ScalesBackwards(nn.Module):
    """Gradients rounded on the scale of the largest one: of the batch, or of all that were seen so far."""

    def __init__(self, *, is_kept: bool, step: float = 2.0**-24):
        super().__init__()
        seen = [0.0]

        class Scaled(LetsNothingBack):
            @staticmethod
            def backward(ctx, *gradients):
                (gradient,) = gradients
                seen[0] = max(float(gradient.abs().max()), seen[0] if is_kept else 0.0)
                grid = max(seen[0], 1e-30) * step
                return torch.round(gradient / grid) * grid

        self.function = Scaled.apply  # which no snapshot looks into

    def forward(self, hidden):
        return self.function(hidden)


@pytest.mark.parametrize("route", ["batched", "two_pass", "auto"])
def test_gradients_scaled_over_the_batch_are_found(route):
    """Too little to be seen beside the tolerance of the planted units: the bits tell."""
    model = with_layer(ScalesBackwards(is_kept=False))
    if route == "auto":
        assert start(model) == "one_unit"
    else:
        with pytest.raises(SelfTestFailed, match=r"does not add the same bits to the sum .*backward pass"):
            start(model, route=route)


@pytest.mark.parametrize("route", ["auto", "one_unit"])
def test_state_of_a_backward_pass_is_found(route):
    with pytest.raises(SelfTestFailed, match=r"does not add the same bits to the sum|is off by"):
        start(with_layer(ScalesBackwards(is_kept=True)), route=route)


def test_mutant_mates_without_gradients(monkeypatch):
    """Loud rows without gradients show nothing; then only the planted units do, and no other route is tried."""
    arranged = Probe._arranged
    monkeypatch.setattr(
        Probe, "_arranged", lambda self, *args, **options: arranged(self, *args, **{**options, "is_counted": False})
    )
    with pytest.raises(SelfTestFailed, match="do not add up exactly"):
        start(with_layer(ScalesBackwards(is_kept=False)))


# bf16: the unit that is not a number.


def test_message_names_precision_and_the_unit_not_a_number(monkeypatch):
    """A kernel that reads past a row, as bf16 products with a tail do on some CPUs."""

    class ReadsPastTheRow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, *gradients):
            return gradients[0] + 0 * gradients[0].roll(-1, dims=0)

    class Layer(nn.Module):
        def forward(self, hidden):
            return ReadsPastTheRow.apply(hidden)

    assert start(with_layer(Layer()), precision="bf16", route="batched") == "batched"  # that unit is taken out
    original = PerUnitClipper._add_batch
    monkeypatch.setattr(PerUnitClipper, "_add_batch", lambda self, batch, **_: original(self, batch, is_alone=True))
    with pytest.raises(SelfTestFailed, match=r"not a number changes the units beside it.*precision bf16.*fp32"):
        start(with_layer(Layer()), precision="bf16", route="batched")


def test_snapshot_sees_every_kind_of_state():
    layer = nn.Module()
    layer.register_buffer("buffer", torch.zeros(2))
    layer.big = torch.zeros(1 << 19)
    layer.odd = torch.zeros((1 << 21) + 3, dtype=torch.uint8)[1:]
    layer.nested = {"a": [(1, {"b": torch.zeros(1)})]}
    layer.number, layer.nan = 1.0, float("nan")

    def state():
        return traces.snapshot(layer, layer.named_parameters())

    before = state()
    assert not traces.changes(before, state())
    for change in (
        lambda: layer.buffer.add_(1),
        lambda: layer.big[7].add_(1),
        lambda: layer.big.copy_(layer.big.roll(1)),
        lambda: layer.odd[-1].add_(1),
        lambda: layer.nested["a"][0][1]["b"].add_(1),
        lambda: setattr(layer, "number", 2.0),
        lambda: setattr(layer, "new", 0),
        lambda: delattr(layer, "number"),
    ):
        change()
        now = state()
        assert len(traces.changes(before, now)) == 1
        before = now
