"""Write a traced model as an ONNX file, and read an ONNX file as a function."""

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

OPSET = 20
PRODUCER = "audio_mamba"
OUTPUT = "logits"
BATCH = "batch"  # name of the axis of any length
FOLDED = 1024  # numbers, at most, in a tensor that is calculated beforehand: larger ones would make the file larger
WEIGHTS = "weights."  # prefix of the names of stored weights (`exported.Exported`)


def to_onnx(program: ExportedProgram, name: str, metadata: dict[str, str]) -> bytes:
    """Return an ONNX model with the input ``name``, and with stored weights, unchanged, under their own names."""
    with quiet():
        made = torch.onnx.export(
            program, input_names=[name], output_names=[OUTPUT], opset_version=OPSET, optimize=False, verbose=False
        )
        _tidy(made.model)
    proto = made.model_proto
    for node in _nodes(proto.graph):
        node.ClearField("metadata_props")  # its place in the Python code: two thirds of the file
    for part in (proto, proto.graph, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.ClearField("metadata_props")
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    proto.producer_name, proto.producer_version = PRODUCER, ""
    for key, text in metadata.items():
        proto.metadata_props.add(key=key, value=text)
    return proto.SerializeToString()


def session(path: Path):
    """Return ONNX Runtime's session of a file, on the CPU, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function of an ONNX file: waveform or log-mel -> logits."""
    loaded = session(path)
    name = loaded.get_inputs()[0].name
    return lambda x: torch.from_numpy(loaded.run([OUTPUT], {name: np.ascontiguousarray(x.numpy())})[0])


def _tidy(model) -> None:
    """Fold constants, and remove what is unused or doubled.

    This is onnxscript's optimiser without its rewriting rules, which take minutes for 24 layers and gain nothing here.
    """
    import onnx_ir.passes.common as passes  # takes seconds
    from onnxscript import optimizer

    optimizer.inline(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, input_size_limit=FOLDED, output_size_limit=FOLDED, should_fold=_should_fold)
        optimizer.remove_unused_nodes(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.NameFixPass()(model)


def _should_fold(node) -> bool | None:
    """Return False for what depends on stored weights, None to leave a node to the optimiser's own rules."""
    stored = any(x is not None and (x.name or "").startswith(WEIGHTS) for x in node.inputs)
    return False if stored else None


def _nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


@contextmanager
def quiet():
    """Silence the exporters' warnings, about which a user can do nothing."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch._export")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
