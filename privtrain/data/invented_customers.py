"""Invented customers: texts whose sensitive spans are known exactly, for studies, attacks and demonstrations.

A customer has a profile (name, e-mail, telephone, street, account number, date of birth) and a habit (a few products,
moods and closing phrases of their own), and writes a heavy-tailed number of messages from templates. Every slot that is
filled from the profile is a labelled span, so "how well does the model predict the sensitive tokens" has an exact
answer (Das et al. 2025, arXiv 2502.13313, measure it on such customer records). No real person is described; all values
come from :mod:`faker` and a seed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from privtrain.errors import ConfigError, Fault

if TYPE_CHECKING:
    from faker import Faker

#: Slots that are filled from a customer's profile; everything else in a text is not sensitive.
SENSITIVE_SLOTS = ("name", "email", "phone", "street", "account", "birthday")

_TEMPLATES = (
    "Hello, this is {name}. My {product} {problem}. Please call me at {phone}. {closing}",
    "Order of one {product}, to be sent to {street}. Confirm to {email}, please. {closing}",
    "I want to change the address of my account {account}: I have moved to {street}. {closing}",
    "My {product} {problem} again. I am {mood} about it. You can write to {email}. {closing}",
    "Please check my account {account}. I was charged twice for a {product}. {closing} {name}",
    "To confirm who I am: {name}, born on {birthday}, account {account}. The {product} {problem}. {closing}",
    "I am {mood} with the {product}, it came in two days. {closing}",
    "The {product} {problem}, and nobody answers. I am {mood}. {closing}",
    "Can you tell me when the {product} is back in stock? {closing}",
    "Thank you for the quick help with my {product}. I am {mood}. {closing} {name}",
)
_PRODUCTS = (
    "kettle", "desk lamp", "bicycle pump", "rain coat", "coffee grinder", "garden hose", "office chair", "backpack",
    "toaster", "headset", "tent", "water bottle", "cutting board", "phone case", "yoga mat", "bookshelf", "heater",
    "electric drill", "picture frame", "alarm clock", "frying pan", "sleeping bag", "umbrella", "keyboard",
)  # fmt: skip
_PROBLEMS = (
    "does not switch on", "arrived with a crack", "makes a strange noise", "stopped working after a week",
    "is missing a screw", "came in the wrong colour", "leaks at the bottom", "smells of burnt plastic",
)  # fmt: skip
_MOODS = ("very happy", "quite disappointed", "rather annoyed", "pleasantly surprised", "a little worried", "angry")
_CLOSINGS = ("Thanks!", "Kind regards,", "Please hurry.", "Looking forward to your answer.", "Best,", "Cheers,")


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of a text are sensitive, of the kind ``label``."""

    start: int
    end: int
    label: str


@dataclasses.dataclass(frozen=True)
class CustomerRecord:
    """One message of one customer.

    Attributes:
        user: the customer's id.
        text: the message.
        spans: its sensitive parts, in order, without overlap.
    """

    user: str
    text: str
    spans: tuple[Span, ...]

    def as_row(self) -> dict[str, object]:
        """Return a row of a JSONL data set: ``user``, ``text`` and ``spans``."""
        return dataclasses.asdict(self)


def customer_records(
    num_users: int,
    *,
    seed: int,
    mean_records: float = 12.0,
    tail: float = 1.6,
    max_records: int = 200,
    repeat_prob: float = 0.0,
) -> Iterator[CustomerRecord]:
    """Return messages of ``num_users`` customers, customer by customer.

    Args:
        num_users: customers; each writes at least one message.
        seed: the same seed gives the same texts.
        mean_records: about how many messages a customer writes (the tail is cut at ``max_records``).
        tail: shape of the Pareto law of the number of messages, above 1; smaller is heavier.
        max_records: the most messages of one customer.
        repeat_prob: chance that a message is one of the customer's earlier ones, sent again.

    Raises:
        ConfigError: if an argument is out of range, or faker is not installed.
    """
    _check(num_users, mean_records, tail, max_records, repeat_prob)
    rng = np.random.default_rng(seed)
    faker = _faker(seed)
    # The mean of a Pareto law with minimum m is m * tail / (tail - 1).
    smallest = mean_records * (tail - 1) / tail
    for number in range(num_users):
        profile = _profile(faker)
        habit = {slot: _favourites(rng, values) for slot, values in _CHOICES.items()}
        num_records = int(np.clip(smallest * (1 + rng.pareto(tail)), 1, max_records))
        sent: list[CustomerRecord] = []
        for _ in range(num_records):
            # No number is drawn for nothing: texts of a seed without repetitions stay the same.
            if sent and repeat_prob > 0 and rng.random() < repeat_prob:
                sent.append(sent[int(rng.integers(len(sent)))])
            else:
                sent.append(_message(f"customer-{number:06d}", profile, habit, rng))
        yield from sent


def write_customers(path: pathlib.Path, records: Iterator[CustomerRecord]) -> int:
    """Write records as JSON lines into a new file; return how many.

    Raises:
        ConfigError: if the file exists; nothing is overwritten.
    """
    num_records = 0
    try:
        with path.open("x", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record.as_row()) + "\n")
                num_records += 1
        return num_records
    except FileExistsError:
        raise ConfigError([Fault("OUTPUT", f"{path} exists; choose another file or remove it")]) from None
    except OSError as error:
        raise ConfigError([Fault("OUTPUT", f"{path} cannot be written: {error.strerror}")]) from None


_OLDEST, _YOUNGEST = datetime.date(1935, 1, 1), datetime.date(2005, 12, 31)
_CHOICES = {"product": _PRODUCTS, "problem": _PROBLEMS, "mood": _MOODS, "closing": _CLOSINGS}


def _message(
    user: str, profile: dict[str, str], habit: dict[str, list[str]], rng: np.random.Generator
) -> CustomerRecord:
    """Return one message: a random template, filled in.

    Args:
        user: the customer's id.
        profile: slot → the customer's sensitive value; where one is filled in, its span is noted.
        habit: other slot → the customer's favourite values, of which one is drawn.
        rng: draws template and values.
    """
    template = _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
    text, spans = "", []
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is None:  # the text ends without a slot
            continue
        if slot in SENSITIVE_SLOTS:
            value = profile[slot]
            spans.append(Span(len(text), len(text) + len(value), slot))
        else:
            value = habit[slot][int(rng.integers(len(habit[slot])))]
        text += value
    return CustomerRecord(user, text, tuple(spans))


def _profile(faker: Faker) -> dict[str, str]:
    """Return one invented person's details, by kind."""
    return {
        "name": faker.name(),
        "email": faker.email(),
        "phone": faker.numerify("###-###-####"),
        "street": faker.street_address(),
        "account": faker.bban(),
        "birthday": faker.date_between_dates(_OLDEST, _YOUNGEST).isoformat(),
    }


def _favourites(rng: np.random.Generator, values: tuple[str, ...]) -> list[str]:
    """Draw up to three values that a customer's texts repeat, a signal for user inference besides the profile."""
    return [str(value) for value in rng.choice(values, size=min(3, len(values)), replace=False)]


def _faker(seed: int) -> Faker:
    try:
        from faker import Faker
    except ImportError:
        raise ConfigError([Fault("faker", "is not installed: pip install 'privtrain[customers]'")]) from None
    faker = Faker("en_US")
    faker.seed_instance(seed)
    return faker


def _check(num_users: int, mean_records: float, tail: float, max_records: int, repeat_prob: float) -> None:
    """Raise ConfigError with every argument of :func:`customer_records` that is out of range."""
    allowed = [
        ("num_users", num_users >= 1, f"given {num_users}; must be at least 1"),
        ("mean_records", mean_records >= 1, f"given {mean_records:g}; must be at least 1"),
        ("tail", tail > 1, f"given {tail:g}; must be above 1, where the mean exists"),
        ("max_records", max_records >= 1, f"given {max_records}; must be at least 1"),
        ("repeat_prob", 0 <= repeat_prob <= 1, f"given {repeat_prob:g}; must lie in [0, 1]"),
    ]
    faults = [Fault(key, problem) for key, holds, problem in allowed if not holds]
    if faults:
        raise ConfigError(faults)
