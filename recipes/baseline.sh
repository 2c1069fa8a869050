#!/usr/bin/env bash
# The DCASE2025 baseline's model, CP-Mobile, on TAU22 with the baseline's augmentation: Freq-MixStyle and rolling, no masks.
#
#     bash recipes/baseline.sh /data/TAU22
#
# It differs from the published baseline on purpose: the general model's epoch is chosen on clips held out of the training
# split, and the log-mel is normalised. Flags after the folder go to both scripts. PROJECT names the folder of the runs.
# The same command resumes what was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: bash recipes/baseline.sh /data/TAU22 [FLAGS]}
shift
source recipes/run.sh

run train_base.py baseline-general --dataset_dir "$data" --experiment_name CP_Mobile \
    --model cp_mobile --weight_bits 16 --n_epochs 150 --batch_size 256 --lr 0.005 --warmup_steps 2000 \
    --mixstyle_p 0.4 --mixstyle_alpha 0.3 --freqm 48 --timem 0 "$@"
run train_device_specific.py baseline-devices --dataset_dir "$data" --experiment_name CP_Mobile_DeviceSpecific \
    --ckpt_id baseline-general --n_epochs 50 --warmup_steps 200 --own_share 1 --keep all "$@"
