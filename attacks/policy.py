"""Which findings end the report with an exit code that stops a pipeline. Declared in a file, before the run is seen."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import yaml

from attacks.errors import AttackInputError
from attacks.verdict import Verdict


class Policy(pydantic.BaseModel):
    """What fails a run.

    Attributes:
        fail_on_verdicts: verdicts that fail, of statistics and of panels.
        max_auroc_lower: the largest lower end of the AUROC interval that passes; null sets none.
        statistics: judge the declared headline alone, or every statistic.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    fail_on_verdicts: list[Verdict] = [Verdict.FALSIFIED]
    max_auroc_lower: float | None = pydantic.Field(default=None, ge=0.0, le=1.0)
    statistics: Literal["headline", "all"] = "headline"

    def violations(self, attacks: Mapping[str, Any]) -> list[str]:
        """What the results of ``attacks analyse`` break, one sentence each."""
        names = [attacks["headline"]] if self.statistics == "headline" else list(attacks["results"])
        found = []
        for name in names:
            result = attacks["results"][name]
            # Of the level at which the statistic is judged: many at once need wider intervals.
            lower = result["verdict_lower"]
            if result["verdict"] in set(self.fail_on_verdicts):
                found.append(f"{name}: verdict {result['verdict']}")
            if self.max_auroc_lower is not None and lower > self.max_auroc_lower:
                found.append(f"{name}: AUROC is at least {lower:.4f}, above the allowed {self.max_auroc_lower:g}")
        for name, panel in attacks["panels"].items():
            if panel and panel.get("verdict") in set(self.fail_on_verdicts):
                found.append(f"{name}: verdict {panel['verdict']}")
        return found


def read_policy(path: pathlib.Path) -> Policy:
    """Reads a YAML policy.

    Raises:
        AttackInputError: naming every fault.
    """
    try:
        return Policy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise AttackInputError(f"cannot read the policy {path}: {error.strerror}; expected a YAML file") from None
    except yaml.YAMLError:
        raise AttackInputError(f"{path} is not YAML; expected keys {', '.join(Policy.model_fields)}") from None
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'policy'}: {fault['msg']}" for fault in error.errors()
        )
        raise AttackInputError(f"{path}: {faults}; expected keys {', '.join(Policy.model_fields)}") from None
