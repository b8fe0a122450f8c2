"""``privtrain disclose``: filled from the statement; what only the publisher knows is marked, never invented."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from privtrain.commands.disclose import disclose
from privtrain.errors import VerificationFailed
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.disclosure import FOR_YOU

#: The keys of a record of tier 3 in OpenDP's registry of deployments, by section.
FIELDS = {
    "product": "name data_curators intended_use data_product_type data_product_region description publication_date "
    "data_product_sector",
    "dp_flavor": "name input_metric bound_on_input_distance output_measure bound_on_output_distance data_domain "
    "unprotected_quantities",
    "privacy_loss": "privacy_unit privacy_unit_description privacy_parameters privacy_parameters_description",
    "model": "model_name actors release_type release_type_description data_source_type access_type",
    "accounting": "post_processing composition",
    "implementation": "pre_processing_eda_hyperparameter_tuning mechanisms justification",
    "resources": "sources registry_authors",
}


@pytest.fixture(autouse=True)
def _coarse_curve(monkeypatch):
    """The tour of the guides' commands computes all points."""
    monkeypatch.setattr("privtrain.commands.disclose._NUM_POINTS", 40)


def test_record_has_registry_fields_and_statement_numbers(released_run):
    record = yaml.safe_load(disclose(released_run, "opendp"))
    statement = json.loads((released_run / "privacy.json").read_text())
    assert set(record["deployment"]) == set(FIELDS)
    for section, names in FIELDS.items():
        assert set(record["deployment"][section]) == set(names.split())
    loss = record["deployment"]["privacy_loss"]
    assert loss["privacy_parameters"] == {"epsilon": statement["epsilon"], "delta": statement["delta"]}
    assert record["deployment"]["dp_flavor"]["unprotected_quantities"] == " ".join(statement["not_covered"]) or "None."
    assert record["deployment"]["product"]["intended_use"] == FOR_YOU


def test_checklist_answers_from_statement_and_marks_rest(released_run):
    page = disclose(released_run, "nist")
    statement = json.loads((released_run / "privacy.json").read_text())
    assert f"ε = {statement['epsilon']:.4g}, δ = {statement['delta']:g}" in page
    assert "μ = " in page
    assert FOR_YOU in page
    for layer in ("Guarantee", "Unit of privacy", "Algorithm", "Implementation", "Trust", "Access control"):
        assert f"| {layer} |" in page
    assert all(line.count("|") == 4 for line in page.splitlines() if line.startswith("| "))


def test_one_number_stands_beside_epsilon_and_delta(released_run):
    found = json.loads(disclose(released_run, "gdp"))
    assert found["gaussian"]["certified"] is True
    assert found["gaussian"]["mu"] > 0
    assert found["gaussian"]["slack"] <= 0.01 * found["delta"] * 1.01


def test_the_plan_is_the_statements_and_is_not_made_again(released_run, monkeypatch):
    """Made again, without the optimizer's settings, banded noise would be another than the run's."""
    seen, rebuild = [], PrivacyPlan.from_body
    monkeypatch.setattr(PrivacyPlan, "build", None)
    monkeypatch.setattr(PrivacyPlan, "from_body", lambda body: seen.append(body) or rebuild(body))
    assert json.loads(disclose(released_run, "gdp"))["gaussian"] is not None
    assert json.loads((released_run / "privacy.json").read_text())["plan"] in seen


def test_an_altered_run_is_not_disclosed(released_run, tmp_path):
    shutil.copytree(released_run, tmp_path / "run")
    path = tmp_path / "run" / "privacy.json"
    path.write_text(path.read_text().replace('"delta": 0.001', '"delta": 0.0001'))
    with pytest.raises(VerificationFailed):
        disclose(tmp_path / "run", "opendp")
