import json
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from accountants import cli

RUN = ["-s", "1", "-q", "0.01", "-t", "1000", "-d", "1e-5"]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def test_epsilon_prints_the_number_with_its_kind():
    result = invoke("epsilon", *RUN)
    assert result.output.startswith("epsilon = 1.82")
    assert "certified_upper" in result.output


def test_json_is_strict_json():
    answer = json.loads(invoke("epsilon", *RUN, "-a", "eeai", "--json").output)
    assert answer["upper"] == "inf"
    assert answer["note"].startswith("vacuous")


def test_delta_of_one_command_is_the_epsilon_of_the_other():
    epsilon = json.loads(invoke("epsilon", *RUN, "-a", "tilted", "--json").output)["upper"]
    answer = json.loads(invoke("delta", "-s", "1", "-q", "0.01", "-t", "1000", "-e", str(epsilon), "--json").output)
    assert answer["lower"] <= 1e-5 <= answer["upper"] * 1.01


def test_calibrate_finds_what_it_is_asked_for():
    common = ["-e", "2", "-d", "1e-5", "-q", "0.01", "-a", "tilted", "--json"]
    noise = json.loads(invoke("calibrate", *common, "-t", "1000").output)["value"]
    steps = json.loads(invoke("calibrate", *common, "--for", "num-steps", "-s", str(noise)).output)["value"]
    assert steps >= 1000


def test_compare_names_every_accountant_and_its_kind():
    rows = json.loads(invoke("compare", *RUN, "--json").output)
    kinds = {row["name"]: row["answer"]["kind"] for row in rows}
    assert kinds["tilted"] == "certified_upper"
    assert kinds["aea1"] == "estimate"
    assert kinds["gdp"] == "asymptotic"
    assert "tilted" in invoke("compare", *RUN, "--accountants", "tilted,gdp").output


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--sampler", "truncated-poisson", "-q", "0.1", "--batch-size", "40", "--num-units", "200"], "pld"),
        (["--sampler", "fixed-size", "--batch-size", "5", "--num-units", "99", "--relation", "replace_one"], "rdp"),
        (["--sampler", "shuffled", "--num-epochs", "2", "--relation", "replace_special"], "tilted"),
    ],
)
def test_compare_asks_the_accountants_that_fit_the_sampler(options, method):
    rows = json.loads(invoke("compare", "-s", "1", "-t", "10", "-d", "1e-5", *options, "--json").output)
    answer = next(row["answer"] for row in rows if row["name"] == method)
    assert answer["kind"] == "certified_upper"
    assert 0 < answer["upper"] < 100


@pytest.mark.parametrize("command", ["epsilon", "delta", "compare"])
def test_commands_about_a_run_share_its_options(command):
    (declared,) = (each for each in typer.main.get_command(cli.app).commands.values() if each.name == command)
    names = {name for parameter in declared.params for name in parameter.opts}
    assert {"--sampler", "--relation", "--num-records", "--num-epochs", "--num-selected", "--json"} <= names


def test_curve_draws_and_caps_attacks(tmp_path):
    picture = tmp_path / "curve.png"
    data = json.loads(invoke("curve", *RUN, "--points", "6", "--json", "--plot", str(picture)).output)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["certified"] is True
    caps = data["attack_cap"]
    assert all(tpr >= fpr for fpr, tpr in zip(caps["false_positive_rate"], caps["true_positive_rate"], strict=True))
    assert max(data["epsilon_over_steps"]["epsilon"]) == pytest.approx(1.828, abs=0.01)


def test_convert_is_the_black_box_group():
    result = json.loads(invoke("convert", "-e", "0.5", "-d", "1e-6", "-k", "3", "--json").output)
    assert result["epsilon"] == pytest.approx(1.5)
    assert result["delta"] > 3e-6


@pytest.mark.parametrize(
    "arguments",
    [
        ["epsilon", "-s", "1", "-q", "1.5", "-t", "10", "-d", "1e-5"],
        ["epsilon", *RUN, "-a", "nobody"],
        ["epsilon", *RUN, "--num-records", "0"],
        ["epsilon", *RUN, "--sampler", "fixed-size", "--batch-size", "5", "--num-units", "100"],
        ["calibrate", "-e", "-1", "-d", "1e-5"],
        ["calibrate", "-e", "2", "-d", "1e-5", "-q", "0.01", "-t", "10", "-a", "aea1"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accountants", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("accountants: ")
    assert said.err.count("\n") == 1
    assert not said.out


NEEDED = {
    "poisson": {"-q": "0.01", "-t": "10"},
    "truncated-poisson": {"-q": "0.01", "-t": "10", "--num-units": "100", "--batch-size": "20"},
    "fixed-size": {"-t": "10", "--num-units": "100", "--batch-size": "20"},
    "random-allocation": {"-t": "10", "--num-selected": "1", "--num-epochs": "2"},
    "shuffled": {"-t": "10", "--num-epochs": "2"},
}
EVERY = {option: value for options in NEEDED.values() for option, value in options.items()}
LONG = {"-q": "--sampling-prob", "-t": "--num-steps", "-s": "--noise-multiplier"}
COMMANDS = {
    "epsilon": ["-d", "1e-5"],
    "delta": ["-e", "1"],
    "compare": ["-d", "1e-5"],
    "calibrate": ["-e", "1", "-d", "1e-5"],
    "curve": ["-d", "1e-5"],
}


def flat(options):
    return [part for pair in options.items() for part in pair]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("sampler", NEEDED)
def test_options_a_sampler_needs_are_required_others_refused(command, sampler):
    noise = {} if command == "calibrate" else {"-s": "1"}
    needed = NEEDED[sampler] | noise
    start = [command, *COMMANDS[command], "--sampler", sampler]
    for option in needed:
        rest = {name: value for name, value in needed.items() if name != option}
        with pytest.raises(ValueError, match=f"{LONG.get(option, option)} is missing"):
            invoke(*start, *flat(rest))
    others = {option: value for option, value in EVERY.items() if option not in needed}
    for option, value in others.items():
        with pytest.raises(ValueError, match=f"{LONG.get(option, option)}=.* leave it out"):
            invoke(*start, *flat(needed), option, value)
    with pytest.raises(ValueError, match="is missing") as refusal:
        invoke(*start, *flat(others))
    assert str(refusal.value).count("leave it out") == len(others)
    assert str(refusal.value).count("is missing") == len(needed)


@pytest.mark.parametrize(
    ("options", "method", "relation"),
    [
        (["--sampler", "poisson", "-q", "0.1"], "pld", "ADD_OR_REMOVE_ONE"),
        (["--sampler", "poisson", "-q", "0.1", "--relation", "replace_one"], "pld", "REPLACE_ONE"),
        (
            ["--sampler", "truncated-poisson", "-q", "0.1", "--batch-size", "40", "--num-units", "200"],
            "pld",
            "REPLACE_SPECIAL",
        ),
        (["--sampler", "fixed-size", "--batch-size", "5", "--num-units", "99"], "rdp", "REPLACE_ONE"),
        (["--sampler", "shuffled", "--num-epochs", "2"], "pld", "REPLACE_SPECIAL"),
    ],
)
def test_accountant_and_relation_fit_the_sampler_and_are_printed(options, method, relation):
    answer = json.loads(invoke("epsilon", "-s", "1", "-t", "10", "-d", "1e-5", *options, "--json").output)
    assert answer["method"] == method
    assert answer["relation"] == relation
    assert f"{method}," in (text := invoke("epsilon", "-s", "1", "-t", "10", "-d", "1e-5", *options).output)
    assert relation in text


@pytest.mark.parametrize(
    "options",
    [
        ["--sampler", "fixed-size", "--batch-size", "5", "--num-units", "99", "-t", "10"],
        ["--sampler", "shuffled", "-t", "10", "--num-epochs", "2"],
        ["-q", "0.05", "-t", "10", "--relation", "replace_one"],
        ["--phase", "1:0.05:10", "--phase", "2:0.1:5"],
        ["--phase", "1:0.05:10", "--phase", "2:0.1:5", "--num-records", "2", "-a", "tilted"],
    ],
)
def test_calibrate_takes_every_sampler_relation_and_phases(options):
    found = json.loads(invoke("calibrate", "-e", "3", "-d", "1e-5", *options, "--json").output)
    assert found["answer"]["method"] == found["accountant"]
    assert 0.95 * 3 <= found["answer"]["upper"] <= 3
    spent = json.loads(invoke("epsilon", "-s", str(found["value"]), "-d", "1e-5", *options, "--json").output)
    assert spent["upper"] == found["answer"]["upper"]
    rest = json.loads(invoke("epsilon", "-s", str(found["value"] - 1e-4), "-d", "1e-5", *options, "--json").output)
    assert rest["upper"] > 3


def test_phases_compose_and_what_is_no_phase_is_refused():
    run = ["-d", "1e-5", "-a", "tilted", "--json"]
    whole = json.loads(invoke("epsilon", "-s", "2", "--phase", "0.5:0.01:700", "--phase", "0.5:0.01:300", *run).output)
    assert whole == json.loads(invoke("epsilon", *RUN, "-a", "tilted", "--json").output)
    with pytest.raises(ValueError, match="NOISE:PROB:STEPS"):
        invoke("epsilon", "-s", "2", "--phase", "1:0.01", *run)
    with pytest.raises(ValueError, match="sampling_prob"):
        invoke("epsilon", "-s", "2", "--phase", "1:7:3", *run)


def test_help_does_not_import_the_numerics():
    code = (
        "import sys; import accountants.cli; print(any(m in sys.modules for m in ('numpy', 'dp_accounting', 'torch')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "False"


def test_no_accountant_needs_torch():
    code = (
        "import sys, accountants; e = accountants.dp_sgd_event(noise_multiplier=1, sampling_prob=.1, num_steps=200)\n"
        "for name in accountants.ACCOUNTANTS:\n"
        "    if name not in ('prv', 'allocation'): accountants.epsilon(e, 1e-5, accountant=name)\n"
        "print('torch' in sys.modules)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "False"
    assert time.perf_counter() - start < 60


def test_compare_draws_its_rows(tmp_path):
    picture = tmp_path / "rows.png"
    invoke("compare", *RUN, "--accountants", "tilted,rdp,aea1,eeai,allocation", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
