#!/usr/bin/env bash
# The whole project in small: SynthTAU (synthetic), a general model, one per device, the evaluation of the result.
set -euo pipefail
project=${1:-demo_runs}
unset TAU22_DIR  # the demo is about the embedded data set

run_of() { sed -n 's/^run \([a-z0-9]*\): .*/\1/p' "$1"; }
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

python train_base.py --project_name "$project" --experiment_name demo_general --model aum_nano \
    --n_epochs 12 --check_val_every_n_epoch 3 --lr 0.003 --warmup_steps 60 --wandb_mode offline | tee "$log/general"
general=$(run_of "$log/general")

python train_device_specific.py --project_name "$project" --experiment_name demo_device_specific --ckpt_id "$general" \
    --n_epochs 3 --check_val_every_n_epoch 1 --lr 0.0005 --warmup_steps 10 --wandb_mode offline | tee "$log/specific"
specific=$(run_of "$log/specific")

python test_only.py --project_name "$project" --ckpt_path "$project/$specific/checkpoints/best.ckpt" \
    --wandb_mode disabled

echo
echo "general model:          $project/$general/report/"
echo "device-specific models: $project/$specific/report/"
echo "These figures come from synthetic data and say nothing about TAU22."
