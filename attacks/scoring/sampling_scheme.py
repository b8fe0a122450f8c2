"""How text is drawn from a model: temperature, then the top k tokens, then the top p of what is left; renormalised.

Whether a model repeats a training record depends on it as much as on the model, so the probability of each token *under
the scheme* is a signal of its own. One teacher-forced forward pass gives it for a whole document.
"""

from __future__ import annotations

import dataclasses

from attacks.errors import AttackInputError


@dataclasses.dataclass(frozen=True)
class SamplingScheme:
    """A way of drawing the next token.

    Attributes:
        temperature: divides the logits.
        top_k: tokens that may be drawn at all (ties with the last one included); 0 for all.
        top_p: of those, the fewest likeliest ones that hold at least this share.

    Raises:
        AttackInputError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise AttackInputError(f"sampling {self}: expected temperature > 0, top_k >= 0 and 0 < top_p <= 1")

    @classmethod
    def parse(cls, text: str) -> SamplingScheme:
        """Read ``temperature=1,top_k=40,top_p=1``; what is left out has its default.

        Raises:
            AttackInputError: if a part is unknown or no number.
        """
        kinds = {"temperature": float, "top_k": int, "top_p": float}
        numbers = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, value = part.partition("=")
            try:
                numbers[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise AttackInputError(f"unknown sampling {part!r}; expected temperature=T, top_k=K, top_p=P") from None
        return cls(**numbers)

    def __str__(self) -> str:
        return f"temperature={self.temperature:g},top_k={self.top_k},top_p={self.top_p:g}"
