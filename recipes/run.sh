# Sourced by the recipes: `run SCRIPT ID FLAGS...` starts the run ID, resumes it, or leaves it where it is finished. A
# resumed run refuses a flag that changes its figures. `result ID NAME...` prints an entry of a finished
# run's results.json, or an entry of an entry; `epochs ID` prints the number of epochs of its best model.

project=${PROJECT:-DCASE25_Task1}
export PYTHONUNBUFFERED=1 # lines appear when they are printed, also through a pipe

run() {
    local script=$1 id=$2
    shift 2
    if [ -f "$project/$id/results.json" ]; then
        echo "$script: run $id is finished"
    elif [ -f "$project/$id/config.json" ]; then
        python "$script" --project_name "$project" --resume "$id" "$@"
    else
        python "$script" --project_name "$project" --run_id "$id" "$@"
    fi
}

result() {
    local file=$project/$1/results.json
    shift
    python -c 'import functools, json, sys
print(functools.reduce(dict.get, sys.argv[2:], json.load(open(sys.argv[1]))))' "$file" "$@"
}

epochs() {
    python -c 'import sys, torch
print(torch.load(sys.argv[1], map_location="cpu", weights_only=True)["epoch"] + 1)' "$project/$1/checkpoints/best.ckpt"
}
