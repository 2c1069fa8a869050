#!/usr/bin/env bash
# The DCASE2025 baseline on TAU22: CP-Mobile with the baseline's settings, which are the defaults of --model cp_mobile.
#
#     bash recipes/baseline.sh /data/TAU22
#     bash recipes/baseline.sh /data/TAU22 --val_fraction 0     # train on every clip and keep the last epoch, as the baseline
#
# As there: rolling, frequency masks of the linear mel, then its logarithm, then Freq-MixStyle; no input normalisation;
# no gradient clipping; batches of 256, a learning rate of 0.005 and a tenth of it in stage 2, without Freq-MixStyle;
# the fine-tuned model of every device.
# It differs on purpose: the epoch is chosen on clips held out of the training split (--val_fraction 0 undoes that);
# weight decay spares biases and norms; the last 10 epochs round the weights to the 16 bits that are tested, and the test
# computes in 32 bits with them.
#
# Flags after the folder go to both scripts. PROJECT names the folder of the runs. The same command resumes what was
# interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: bash recipes/baseline.sh /data/TAU22 [FLAGS]}
shift
source recipes/run.sh

run train_base.py baseline-general --dataset_dir "$data" --experiment_name CP_Mobile \
    --model cp_mobile "$@"
run train_device_specific.py baseline-devices --dataset_dir "$data" --experiment_name CP_Mobile_DeviceSpecific \
    --ckpt_id baseline-general --n_epochs 50 --warmup_steps 200 --own_share 1 --keep all "$@"
