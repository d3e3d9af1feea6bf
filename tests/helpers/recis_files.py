"""Folders in the layout that RecIS saves tables in."""

import json

import numpy as np

_NAMES = {"int64": "I64", "float32": "F32", "float16": "F16", "float64": "F64", "int32": "I32"}


def write_safetensors(path, tensors):
    """Write arrays by name as a safetensors file."""
    header, data, end = {}, b"", 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        described = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape)}
        header[name] = {**described, "data_offsets": [begin, end], "dense": False}
        data += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_recis(folder, tables, ranks=2, old=False):
    """Write tables, each as (ids, rows), in files of so many ranks; ``old`` names as of v1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {}
    for rank in range(ranks):
        tensors = {"tower.0.weight^ ": np.ones((2, 2), np.float32)} if rank == 0 else {}
        for name, (ids, rows) in tables.items():
            own = ids % ranks == rank
            part = f"{rank * 100}^{rank * 100 + 100}^{ranks * 100}"
            slots = {"id": ids[own], "embedding": rows[own], "sparse_adamw_exp_avg": rows[own]}
            for slot, values in slots.items():
                key = f"{name}.{slot}/part_{rank}_{ranks}"
                keys[key] = f"{name}@{slot}^{part}"
                tensors[keys[key] if old else key] = values
        write_safetensors(folder / f"model-{rank:06d}-of-{ranks:06d}.safetensors", tensors)
    (folder / "index").write_text("{}")
    if not old:
        (folder / "tensorkey.json").write_text(json.dumps(keys))
