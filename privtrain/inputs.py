"""Check what a valid configuration names (model, data, keys, directories), and read it, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence

from privtrain.config import Config, load_config
from privtrain.config.data import DataSection
from privtrain.config.load import sections_of
from privtrain.config.model import ModelSection
from privtrain.data.corpus import Corpus, check_source, faults_of_first_rows, load_corpus, load_evaluation
from privtrain.data.encode import Encoder
from privtrain.data.formats import has_half_pair
from privtrain.errors import ConfigError, DamagedFile, Fault
from privtrain.files.writable import why_unwritable
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.base_model import check_model, is_at_hand
from privtrain.run.directory import RunDirectory
from privtrain.run.signing import Keys, password_from_environment, signing_faults

#: What W&B knows as its mode, set in the environment.
_WANDB_MODES = ("offline", "online", "disabled", "shared", "dryrun", "run")


def load_checked(path: pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and check what it names: all faults are reported at once.

    Args:
        path: YAML file.
        overrides: dotted assignments such as ``privacy.num_steps=500``.

    Raises:
        ConfigError: with every fault.
    """
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        # Check also what the sections name that are valid by themselves; None stands for one that is not.
        model, data = sections_of(path, overrides)
        input_faults: list[Fault] = []
        if model:
            input_faults += check_model(model)
        if data:
            input_faults += check_source(data)
        if model and data and not input_faults:
            input_faults += template_faults(model, data)
        raise ConfigError([*error.faults, *input_faults], error.source) from None
    check_inputs(config)
    return config


def check_inputs(config: Config) -> None:
    """Raise unless model, data files, columns, trackers, run directory and signing key can be used.

    Run directory and signing key are checked on global rank 0 alone, the only one that writes and signs.

    Raises:
        ConfigError: with every fault.
    """
    faults = check_model(config.model) + check_source(config.data)
    if not faults:
        faults += template_faults(config.model, config.data)
        if faults:  # the rows are read after this; where they cannot be used either, say both at once
            faults += faults_of_first_rows(config.data)
    for name in ("tensorboard", "mlflow", "trackio"):
        if getattr(config.tracking, name) and importlib.util.find_spec(name) is None:
            faults.append(Fault(f"tracking.{name}", f"is not installed: pip install {name}"))
    mode = os.environ.get("WANDB_MODE", "offline")
    if config.tracking.wandb and mode not in _WANDB_MODES:
        faults.append(Fault("WANDB_MODE", f"given {mode!r}; must be one of {', '.join(_WANDB_MODES)}"))
    if has_half_pair(os.getcwd()):  # how Python reads bytes that are no UTF-8
        problem = "the name of the working directory is not UTF-8, and no file of a run could hold it; work in another"
        faults.append(Fault("", problem))
    keys = Keys.of(config.release)
    is_main = os.environ.get("RANK", "0") == "0"
    problem = why_unwritable(config.run.directory) if is_main else ""
    if problem:
        faults.append(Fault("run.output_dir", problem))
    if keys is not None and is_main:
        names = ("release.signing_key", "release.signing_certificate", "release.signing_chain")
        faults += signing_faults(keys, password_from_environment(), names)
    if faults:
        raise ConfigError(faults)


def template_faults(model: ModelSection, data: DataSection) -> list[Fault]:
    """Return what is wrong with the chat template, where conversations are trained on and the tokenizer is at hand."""
    if data.format != "chat" or not is_at_hand(model):
        return []
    from privtrain.models.load import load_tokenizer

    try:
        Encoder(data, load_tokenizer(model))
    except ConfigError as error:
        return list(error.faults)
    except DamagedFile as error:
        return [Fault("data.chat_template_file", str(error))]
    return []


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every rank reads for itself before the process group exists.

    Attributes:
        config: the checked configuration.
        corpus: the records by user.
        plan: what the guarantee depends on, ε and noise included.
        fingerprint: digest of plan and data; ranks compare it, and a resumed run must have the same.
        run: the run directory.
        check_release: called on rank 0 right before anything is released; raises if nothing may be.
        evaluation: the public records of ``data.evaluation``.
    """

    config: Config
    corpus: Corpus
    plan: PrivacyPlan
    fingerprint: str
    run: RunDirectory
    check_release: Callable[[], None] = lambda: None
    evaluation: tuple[str, ...] = ()


def read_inputs(config: Config) -> Inputs:
    """Load the rows and build the plan."""
    corpus = load_corpus(config.data, config.performance.index_dir)
    plan = PrivacyPlan.build(config.privacy, config.training)
    return Inputs(
        config=config,
        corpus=corpus,
        plan=plan,
        fingerprint=plan.fingerprint(corpus.manifest_sha256),
        run=RunDirectory(config.run.directory),
        evaluation=load_evaluation(config.data, corpus),
    )
