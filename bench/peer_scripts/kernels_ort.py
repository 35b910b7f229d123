"""Time per product of ONNX Runtime's MatMulNBits: THREADS ROWS COLS N BYTES, one line "name seconds" per pass.

All copies of a matrix are nodes of one model, as the layers of a network are.
"""

import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper


def measure(level: int, group: int, threads: int, rows: int, cols: int, n: int, n_bytes: float) -> None:
    """Print the seconds of three passes. `level` 4 allows x in int8, 1 keeps it in float32."""
    blocks = cols // group
    copies = max(1, int(n_bytes / (rows * cols / 2 + rows * blocks * 4)))
    rng = np.random.default_rng(0)
    nodes, tensors, outputs = [], [], []
    for i in range(copies):  # different numbers, lest equal ones be stored once
        codes = np.frombuffer(rng.bytes(rows * cols // 2), np.uint8).reshape(rows, blocks, group // 2)
        scales = rng.random(rows * blocks, dtype=np.float32)
        tensors += [onnx.numpy_helper.from_array(codes, f"B{i}"), onnx.numpy_helper.from_array(scales, f"s{i}")]
        facts = {"K": cols, "N": rows, "bits": 4, "block_size": group, "accuracy_level": level}
        names = ["X", f"B{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"Y{i}"], domain="com.microsoft", **facts))
        outputs.append(helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, [n, rows]))
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, [n, cols])
    graph = helper.make_graph(nodes, "products", [x], outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {"X": rng.standard_normal((n, cols)).astype(np.float32)}
    for turn in range(4):
        start = time.perf_counter()
        session.run(None, feed)
        if turn:
            print(f"ort-int4-g{group}-{'int8' if level == 4 else 'f32'} {(time.perf_counter() - start) / copies:.9f}")


if __name__ == "__main__":
    threads, rows, cols, n = map(int, sys.argv[1:5])
    for group in (32, 128):
        for level in (4, 1):
            measure(level, group, threads, rows, cols, n, float(sys.argv[5]))
