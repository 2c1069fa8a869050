#!/usr/bin/env bash
# The whole project on a laptop: SynthTAU (synthetic), a general model, one model per device, the test of the result.
#
#     bash recipes/demo.sh [FOLDER OF THE RUNS]
set -euo pipefail
cd "$(dirname "$0")/.."
project=${1:-demo_runs}
unset TAU22_DIR  # the demo is about the embedded data set
export PYTHONUNBUFFERED=1  # lines appear when they are printed, although tee keeps a copy

run_of() { sed -n 's/^run \([a-z0-9]*\): .*/\1/p' "$1"; }
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

# AuM-Nano's defaults, but a front end of half the size, milder Freq-MixStyle, and smaller batches for more steps.
python train_base.py --project_name "$project" --experiment_name demo_general --model aum_nano --wandb_mode disabled \
    --n_mels 128 --n_fft 2048 --window_length 2048 --freqm 8 --mixstyle_p 0.3 --mixstyle_alpha 0.5 \
    --n_epochs 12 --batch_size 16 --warmup_steps 120 --check_val_every_n_epoch 3 \
    | tee "$log/general"
general=$(run_of "$log/general")

python train_device_specific.py --project_name "$project" --experiment_name demo_device_specific \
    --ckpt_id "$general" --wandb_mode disabled --n_epochs 4 | tee "$log/specific"
specific=$(run_of "$log/specific")

python test_only.py --project_name "$project" --ckpt_path "$project/$specific/stored" \
    --wandb_mode disabled

echo
echo "general model:          $project/$general/report/"
echo "device-specific models: $project/$specific/report/"
echo "These figures come from synthetic data and say nothing about TAU22."
