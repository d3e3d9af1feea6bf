"""Shard files whose content was changed, with checksums that are right."""

import json
from pathlib import Path

from recis_lightning.checkpoint import shard_file
from recis_lightning.checkpoint.shard_file import ShardFile, TensorGroup, write_shard


def craft(folder, start, change, header=None):
    """Change the file of a saved folder whose name begins with ``start``, and its commit.

    Args:
        folder: A folder of ``checkpoint.save``.
        start: Of the file's name.
        change: Called with the tensors, by name, and the metadata; changes them in place.
        header: Called with the header that is written then, a dict; changes it in place.
    """
    path = next(Path(folder).glob(f"{start}*.safetensors"))
    file = ShardFile(path)
    tensors, metadata = {name: file.read(name) for name in file.specs}, file.metadata
    change(tensors, metadata)
    groups = [TensorGroup.of(name, tensor) for name, tensor in tensors.items()]
    digest = write_shard(path, metadata, groups, id)
    if header is not None:
        digest = rewrite_header(path, header)
    commit = json.loads((folder / "checkpoint.json").read_text())
    for shards in commit["tables"].values():
        for shard in shards:
            if shard["file"] == path.name:
                shard["size"], shard["checksum"] = digest
    (folder / "checkpoint.json").write_text(json.dumps(commit))


def rewrite_header(path, change):
    """Change the header of a file, a dict, in place; return the file's new digest."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sums = header["checksums"]["data_offsets"]
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data = content[8 + length :]
    start = len(text).to_bytes(8, "little") + text
    path.write_bytes(start + data)
    checksum = shard_file.crc32(data[slice(*sums)], shard_file.crc32(start))
    return len(start) + len(data), checksum
