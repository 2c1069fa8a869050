"""Call the API of an inference package as the challenge's scripts do, and print what it returns as JSON.

    python -I dcase/submission/probe.py submissions/Doe_Uni Doe_Uni_task1 1

It imports nothing of this project, so only the package's own code is found. `dcase.validate_submission` runs it.
"""

import copy
import importlib
import json
import sys
from pathlib import Path

DEVICE_IDS = ["a", "b", "c", *(f"s{number}" for number in range(1, 11))]  # that the challenge checks


def probe(folder: str, package: str, index: str) -> dict:
    """Return what each function gave, or {"failed": function, "error": why}."""
    sys.path.insert(0, folder)
    step, found = "import", {}
    try:
        import torch
        import torchinfo

        api = importlib.import_module(f"{package}.{package}_{index}")
        clip = str(Path(folder) / package / "resources" / "dummy.wav")
        step = "load_model"
        model = api.load_model()
        step = ".model.state_dict() of what load_model gives"
        found["n_weights"] = len(model.model.state_dict())
        step = "load_inputs"
        inputs = api.load_inputs([clip] * len(DEVICE_IDS), DEVICE_IDS, model)
        found["input_shapes"] = [list(x.shape) for x in inputs]
        step = "get_model_for_device"
        models = {device_id: api.get_model_for_device(model, device_id) for device_id in [*DEVICE_IDS, "unknown"]}
        step = "counting what get_model_for_device gives"
        found["bytes"] = {name: sum(x.numel() * x.element_size() for x in m.parameters()) for name, m in models.items()}
        found["dtypes"] = sorted({str(x.dtype).removeprefix("torch.") for m in models.values() for x in m.parameters()})
        shape = inputs[0].shape
        macs = {
            m: torchinfo.summary(copy.deepcopy(m).float(), input_size=shape, verbose=0) for m in set(models.values())
        }
        found["macs"] = {name: macs[m].total_mult_adds for name, m in models.items()}
        step = "predict"
        device_ids = ["s3", "unknown", "a", "s3"]
        logits, found["class_order"] = api.predict(
            file_paths=[clip] * len(device_ids), device_ids=device_ids, model_file_path=None, use_cuda=False
        )
        found["logits"] = [x.tolist() for x in logits]
        with torch.no_grad():
            found["expected"] = [models[device_id](inputs[0]).flatten().tolist() for device_id in device_ids]
    except Exception as error:  # a package may raise anything
        return {"failed": step, "error": " ".join(f"{type(error).__name__}: {error}".split())}
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(probe(*sys.argv[1:])))
