#!/usr/bin/env bash
# One trial of a W&B sweep: trial.sh RECIPE [key=value ...], started by wandb agent.
# Several GPUs: TRIAL_LAUNCHER="accelerate launch --config_file launch/accelerate/ddp.yaml -m"
set -euo pipefail
: "${PRIVTRAIN_REGISTRY:?set it to the registry of budgets: every trial of a sweep spends budget of the same people}"
recipe=$1
shift
# The name follows from the sweep's trial, so that a trial that is started again resumes.
# shellcheck disable=SC2086 # the launcher is several words
exec ${TRIAL_LAUNCHER:-} privtrain train "$recipe" run.name="sweep-${WANDB_SWEEP_ID##*/}-${WANDB_RUN_ID}" "$@"
