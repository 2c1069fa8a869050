"""Call predict() of a challenge's inference package as the challenge does, and write its logits, as a file that
`dcase.training.logits_files` reads.

    python -P dcase/training/call_package.py JOB.json

JOB.json has the arguments of `main`. This file imports nothing of this project, so the package finds only its own code.
`dcase.training.packages` runs it.
"""

import importlib
import inspect
import json
import sys

import numpy as np
import torch


def main(root: str, module: str, folder: str, filenames: list[str], device_ids: list[str], use_cuda: bool, out: str):
    """Write the logits of the files ``filenames`` of ``folder`` to ``out``; ``root`` is the folder with the module."""
    sys.path.insert(0, root)
    predict = importlib.import_module(module).predict
    takes = inspect.signature(predict).parameters
    more = {"use_cuda": use_cuda} if "use_cuda" in takes else {}  # the challenge's README leaves it out
    with torch.no_grad():
        logits, scenes = predict([f"{folder}/{name}" for name in filenames], device_ids, **more)
    rows = [torch.as_tensor(x).detach().cpu().float().flatten().numpy() for x in logits]
    np.savez(out, filename=filenames, logits=np.stack(rows), scenes=[str(scene) for scene in scenes])


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(**json.load(file))
