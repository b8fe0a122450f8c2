"""Train in this process with the product's own trainer, under a public seed, again and again on one model and split."""

from __future__ import annotations

import dataclasses

import torch

from privtrain.backends.local import LocalBackend
from privtrain.config import Config
from privtrain.data.manifest import draw_split
from privtrain.inputs import Inputs, read_inputs
from privtrain.ledger.log import NullLedger
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import SecretKey
from privtrain.tracking import NullTracker
from privtrain.training.evaluate import evaluate
from privtrain.training.network import Network, load_network
from privtrain.training.selecting import select_units
from privtrain.training.trainer import Trainer


class Bench:
    """Model, users and evaluation records of a configuration and seed, loaded once for many trainings.

    Trainings may differ in ``privacy`` and ``training``, and in nothing that decides the split or the initial weights.

    Args:
        config: the configuration.
        seed: decides split and initial weights.

    Attributes:
        loss_before: mean loss of a token of the evaluation records, in nats.
        num_trained: trained weights.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self._seed, self._backend = seed, LocalBackend(torch.device("cpu"))
        inputs: Inputs = read_inputs(config)
        self._network: Network = load_network(config, self._backend)
        key = SecretKey.insecure(seed, "split")
        split = draw_split(config, inputs.corpus, self._network.tokenizer, key)
        self._inputs, self._split, self._key = inputs, split, key
        texts = [inputs.corpus.records[user][index] for user, index in split.evaluation]
        self._evaluation = self._network.encoder.encode(texts).records
        trained = [(name, p) for name, p in self._network.model.named_parameters() if p.requires_grad]
        self._initial = {name: parameter.detach().clone() for name, parameter in trained}
        self.num_trained = sum(tensor.numel() for tensor in self._initial.values())
        self.loss_before = self._loss()

    def train(self, config: Config, purpose: str) -> tuple[PrivacyPlan, float]:
        """Train from the initial weights; return the plan and the loss after it.

        Args:
            config: what to train with.
            purpose: names the key that sampling and noise are drawn from, with the seed.
        """
        plan, network = PrivacyPlan.build(config.privacy, config.training), self._network
        with torch.no_grad():
            for name, parameter in network.model.named_parameters():
                if name in self._initial:
                    parameter.copy_(self._initial[name])
        inputs = dataclasses.replace(self._inputs, config=config, plan=plan)
        trainer = Trainer(
            plan=plan,
            training=config.training,
            model=network.model,
            units=select_units(inputs, self._backend, network, self._split, self._key, cache=None),
            backend=self._backend,
            key=SecretKey.insecure(self._seed, purpose),
            generation=0,
            ledger=NullLedger(),
            tracker=NullTracker(),
            autocast=network.autocast,
            packer=dataclasses.replace(network.packer, microbatch_size=config.performance.microbatch_size),
            objective=network.objective,
        )
        for step in range(plan.num_steps):
            trainer.train_step(step)
        return plan, self._loss()

    def _loss(self) -> float:
        network = self._network
        scores = evaluate(
            network.model,
            self._evaluation,
            self._backend,
            objective=network.objective,
            packer=network.packer,
            autocast=network.autocast,
        )
        assert scores is not None
        return scores.loss
