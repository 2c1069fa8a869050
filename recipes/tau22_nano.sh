#!/usr/bin/env bash
# AuM-Nano in 8 bits for the challenge, from the recordings to a submission.
#
#     bash recipes/tau22_nano.sh /data/TAU22 /data/MicIRP
#     TEACHER=logits.npz LABEL=Doe_Uni AUTHORS=authors.yaml EVAL=/data/TAU25_eval bash recipes/tau22_nano.sh ...
#
# The second folder holds impulse responses of devices, as MicIRP's. TEACHER is what --teacher takes, such as a file of
# logits; TEACHER=own trains four of its own, cross-fitted; without it the labels are all. LABEL adds the submission.
# docs/challenge.md says what each step was worth where it was measured. Flags after the folders go to the training
# scripts. PROJECT names the folder of the runs. The same command resumes what was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
usage='usage: bash recipes/tau22_nano.sh /data/TAU22 /data/MicIRP [FLAGS]'
data=${1:?$usage} responses=${2:?$usage}
shift 2
source recipes/run.sh
student=(--dataset_dir "$data" --model aum_nano_8bit --dir_path "$responses" "$@")
case ${TEACHER:-} in
    '') search=() final=() ;;
    own) search=(--cross_fit 4) final=(--teacher "$project/nano-search/cross_fit/logits.npz") ;;
    *) search=(--teacher "$TEACHER") final=("${search[@]}") ;;
esac

python -m dcase.prepare --dataset_dir "$data" --pack # one file, which training reads much faster

# With a tenth of the clips held out: how many epochs are best, and is one model per device better, with which share of its
# own weights?
run train_base.py nano-search "${student[@]}" "${search[@]}"
run train_device_specific.py nano-search-devices --dataset_dir "$data" --ckpt_id nano-search "$@"
epochs=$(epochs nano-search)
share=$(result nano-search-devices fine_tuning a share)
devices=$(result nano-search-devices device_models)

# The same on every clip: nothing is left to choose by. Where one model per device is better, each device gets one.
run train_base.py nano-student "${student[@]}" "${final[@]}" --val_fraction 0 --n_epochs "$epochs"
stored=$project/nano-student/stored
if [ "$devices" != "[]" ]; then
    run train_device_specific.py nano-devices --dataset_dir "$data" --ckpt_id nano-student "$@" --val_fraction 0 \
        --keep all --own_share "$share"
    stored=$project/nano-devices/stored
fi

# Test the stored files once more, count their bytes and MACs, and make the submission.
python test_only.py --dataset_dir "$data" --ckpt_path "$stored" --project_name "$project"
python -m dcase.complexity --model aum_nano_8bit --weight_bits 8 --enforce
submit=(python -m dcase.submit --ckpt_path "$stored" --label "${LABEL:-Doe_Uni}" --dataset_dir "$data"
    ${AUTHORS:+--authors "$AUTHORS"} ${EVAL:+--eval_dir "$EVAL"})
if [ -n "${LABEL:-}" ]; then "${submit[@]}"; else echo "to submit it, with your own label: ${submit[*]}"; fi
