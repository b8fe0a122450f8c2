"""Which findings end the report with an exit code that stops a pipeline. Declared in a file, before the run is seen."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from attacks.analysis.verdict import Verdict
from attacks.errors import AttackInputError
from privtrain.files import reading


class Policy(pydantic.BaseModel):
    """What fails a run.

    Attributes:
        fail_on_verdicts: verdicts that fail, of statistics and of panels.
        max_auroc_lower: the largest lower end of the AUROC interval that passes; null sets none.
        statistics: judge the declared headline alone, or every statistic.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    fail_on_verdicts: list[Verdict] = [Verdict.FALSIFIED]
    max_auroc_lower: float | None = pydantic.Field(default=None, ge=0.0, le=1.0)
    statistics: Literal["headline", "all"] = "headline"

    def violations(self, attacks: Mapping[str, Any]) -> list[str]:
        """Return one sentence for each rule of this policy that the results in ``attacks.json`` break."""
        names = [attacks["headline"]] if self.statistics == "headline" else list(attacks["results"])
        broken = []
        for name in names:
            result = attacks["results"][name]
            # Not the reported interval's lower end: where many statistics are judged at once, each needs a wider one.
            lower = result["verdict_lower"]
            if result["verdict"] in set(self.fail_on_verdicts):
                broken.append(f"{name}: verdict {result['verdict']}")
            if self.max_auroc_lower is not None and lower > self.max_auroc_lower:
                broken.append(f"{name}: AUROC is at least {lower:.4f}, above the allowed {self.max_auroc_lower:g}")
        for name, panel in attacks["panels"].items():
            if panel and panel.get("verdict") in set(self.fail_on_verdicts):
                broken.append(f"{name}: verdict {panel['verdict']}")
        return broken


def read_policy(path: pathlib.Path) -> Policy:
    """Read a YAML policy.

    Raises:
        DamagedFile: if it is no YAML file.
        AttackInputError: naming every fault.
    """
    expected = f"expected a YAML file with the keys {', '.join(Policy.model_fields)}"
    try:
        tree = reading.read_yaml(path, remedy=expected, max_bytes=1 << 20, follow_links=True)
        # Strict, so that "0.6" is no number; through JSON, in which a strict model still takes a string as a verdict.
        return Policy.model_validate_json(json.dumps(tree, default=str), strict=True)
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'policy'}: {fault['msg']}" for fault in error.errors()
        )
        raise AttackInputError(f"{path}: {faults}; expected keys {', '.join(Policy.model_fields)}") from None
