"""Train one cell of a study's grid with Opacus, on privtrain's model and split.

Engine, optimizer, Poisson sampling and PRV accountant are Opacus'.
``python opacus_arm.py CONFIG`` writes ``metrics.jsonl`` and ``privacy.json`` into the run directory of a configuration
of ``privtrain train``, in the names that studies read. Base model, LoRA and its initial weights, users that are held
in and evaluation records are what privtrain has at that seed. With ``unit: user`` each user gives one record, drawn
once, so that a record is a user. With ``unit: example`` users give up to ``records_per_user`` records, and the target
is that of a record for which group privacy gives ε and δ of a user. Steps, batch, clipping and learning rate are the
configuration's.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import opacus
import torch
from opacus.accountants.utils import get_noise_multiplier
from torch.utils.data import DataLoader, TensorDataset

from privtrain.backends.local import LocalBackend
from privtrain.config import Config, load_config
from privtrain.data.manifest import draw_split, split_commitment
from privtrain.data.records import Record
from privtrain.files.atomic import write_atomically, write_json
from privtrain.inputs import read_inputs
from privtrain.models.losses import row_losses
from privtrain.privacy.secret import SecretKey
from privtrain.process.exit import run_command
from privtrain.training.evaluate import evaluate, perplexity
from privtrain.training.network import Network, load_network
from privtrain.training.selecting import select_units

ACCOUNTANT = "prv"


def main(path: pathlib.Path) -> None:
    """Train the cell and write what studies read."""
    config = load_config(path)
    seed = config.privacy.insecure_seed
    assert seed is not None, "a study gives it"
    torch.set_num_threads(config.performance.num_threads or 1)
    backend, inputs, key = LocalBackend(torch.device("cpu")), read_inputs(config), SecretKey.insecure(seed, "root")
    network = load_network(config, backend)
    split = draw_split(config, inputs.corpus, network.tokenizer, key)
    units = select_units(inputs, backend, network, split, key, cache=None)
    generator = np.random.default_rng(seed)
    # One record of each unit; where the unit is the example, it has no other.
    records = [unit[int(generator.integers(len(unit)))] for unit in units.records]
    evaluation_texts = [inputs.corpus.records[user][index] for user, index in split.evaluation]
    evaluation_records = network.encoder.encode(evaluation_texts).records
    loss_before = _loss(network, evaluation_records, backend)
    facts = _train(config, network, records, seed)
    loss_after = _loss(network, evaluation_records, backend)
    run = config.run.directory
    run.mkdir(parents=True, exist_ok=True)
    metrics = [
        {"train/step": step, "eval/held_out_loss": loss, "eval/held_out_perplexity": perplexity(loss)}
        for step, loss in ((0, loss_before), (config.privacy.num_steps, loss_after))
    ]
    commitment = split_commitment(key, split.manifest(inputs.corpus)["sha256"])
    write_json(run / "privacy.json", {**facts, "split_commitment": commitment})
    write_atomically(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))


def target_of_record(config: Config) -> tuple[float, float]:
    """Return (ε, δ) of a sampled record for which the user has the configuration's, by group privacy.

    k records that are (ε, δ) each are (kε, δ (e^(kε) - 1) / (e^ε - 1)) together.
    """
    privacy = config.privacy
    epsilon, size = privacy.target_epsilon, privacy.records_per_user or 1
    assert epsilon is not None, "the recipe gives it"
    if privacy.unit == "user":
        return epsilon, privacy.target_delta
    return epsilon / size, privacy.target_delta * math.expm1(epsilon / size) / math.expm1(epsilon)


def _train(config: Config, network: Network, records: list[Record], seed: int) -> dict[str, Any]:
    """Train with Opacus; return the guarantee as its accountant states it."""
    privacy, training = config.privacy, config.training
    ids, masks = _rows(network, records)
    loader = DataLoader(TensorDataset(ids, masks), batch_size=round(privacy.expected_batch_size))
    epsilon, delta = target_of_record(config)
    noise = get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=delta,
        sample_rate=1 / len(loader),
        steps=privacy.num_steps,
        accountant=ACCOUNTANT,
    )
    trained = [p for p in network.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=training.learning_rate, betas=training.betas, weight_decay=training.weight_decay
    )
    torch.manual_seed(seed)
    engine = opacus.PrivacyEngine(accountant=ACCOUNTANT)
    network.model.train()
    made: tuple[Any, ...] = engine.make_private(
        module=network.model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=privacy.clipping_norm,
    )
    model, dp_optimizer, batches = made  # a batch is a Poisson sample of the records
    step = 0
    while step < privacy.num_steps:
        for input_ids, is_target in batches:
            if step == privacy.num_steps:
                break
            for group in dp_optimizer.param_groups:
                group["lr"] = training.learning_rate_at(step, privacy.num_steps)
            dp_optimizer.zero_grad()
            losses = row_losses(model, input_ids, is_target) / is_target[:, 1:].sum(dim=1).clamp(min=1)
            losses.mean().backward()
            dp_optimizer.step()
            step += 1
    spent = engine.get_epsilon(delta)
    model.to_standard_module()
    return {
        "private": False,  # its random numbers follow from a seed
        "by": f"opacus {opacus.__version__}, accountant {ACCOUNTANT}, of a sampled record",
        "epsilon": spent,
        "delta": delta,
        "mechanism": {"noise_multiplier": noise, "expected_batch_size": dp_optimizer.expected_batch_size},
        "num_rows": len(records),
    }


def _rows(network: Network, records: list[Record]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets, [records, longest] each, padded on the right."""
    longest = max(len(record.tokens) for record in records)
    ids = torch.full((len(records), longest), network.packer.pad_id, dtype=torch.int64)
    masks = torch.zeros((len(records), longest), dtype=torch.bool)
    for row, record in enumerate(records):
        ids[row, : len(record.tokens)] = torch.as_tensor(np.asarray(record.tokens), dtype=torch.int64)
        masks[row, : len(record.tokens)] = torch.as_tensor(np.asarray(record.is_target), dtype=torch.bool)
    return ids, masks


def _loss(network: Network, records: list[Record], backend: LocalBackend) -> float:
    """Return the mean loss per predicted token over some records."""
    scores = evaluate(
        network.model,
        records,
        backend,
        objective=network.objective,
        packer=network.packer,
        autocast=network.autocast,
    )
    assert scores is not None, "the evaluation records predict something"
    return scores.loss


if __name__ == "__main__":
    run_command("opacus_arm", lambda: main(pathlib.Path(sys.argv[1])))
