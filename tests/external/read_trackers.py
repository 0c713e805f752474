"""Print what the files of SwanLab and W&B below a folder contain, as JSON: read by the formats of the libraries."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import MessageToDict
from swanlab.converter.wb.wbdatastore import WBDataStoreReader
from swanlab.proto.swanlab.record.v1 import record_pb2
from swanlab.sdk.internal.core_python.store import DataStoreReader
from wandb.proto import wandb_internal_pb2


def records(file: Path, reader: Any, kind: Any) -> Iterator[dict[str, Any]]:
    reader.open(file)
    while (line := reader.scan()) is not None:
        record = kind()
        record.ParseFromString(line)
        yield MessageToDict(record)


def read_wandb(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "samples": [], "step_metric": None}
    for record in records(file, WBDataStoreReader(), wandb_internal_pb2.Record):
        if run := record.get("run"):
            config = {c["key"]: json.loads(c["valueJson"]) for c in run["config"]["update"]}
            found |= {"id": run["runId"], "project": run["project"], "name": run["displayName"], "config": config}
            found["tags"] = run.get("tags", [])
        if "history" in record:
            row = {tuple(i["nestedKey"]): json.loads(i["valueJson"]) for i in record["history"]["item"]}
            if ("loss",) in row:
                found["losses"][row["iter",]] = row["loss",]
            found["samples"] += [
                [row["iter",], key[0], (file.parent / "files" / row[key[0], "path"]).read_text()]
                for key in row if key[1:] == ("path",)
            ]  # fmt: skip
        if "*" in record.get("metric", {}).get("globName", ""):
            found["step_metric"] = record["metric"]["stepMetric"]
        if "exit" in record:
            found["exit"] = record["exit"].get("exitCode", 0)
    return found


def read_swanlab(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "samples": []}
    for record in records(file, DataStoreReader(), record_pb2.Record):
        if start := record.get("start"):
            found |= {"id": start["id"], "project": start["project"], "name": start["name"]}
        if record.get("scalar", {}).get("key") == "loss":
            found["losses"][int(record["scalar"]["step"])] = record["scalar"]["value"]["number"]
        if media := record.get("media"):
            texts = (file.parent / "media" / "text" / item["filename"] for item in media["value"]["items"])
            found["samples"] += [[int(media.get("step", 0)), media["key"], text.read_text()] for text in texts]
        if "finish" in record:
            found["exit"] = record["finish"]["state"]
    written = yaml.safe_load((file.parent / "files" / "config.yaml").read_text())
    return found | {"config": {key: entry["value"] for key, entry in written.items()}}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps({
        "Wandb": [read_wandb(file) for file in sorted(folder.glob("*/wandb/*-run-*/*.wandb"))],
        "SwanLab": [read_swanlab(file) for file in sorted(folder.glob("*/swanlog/*/*.swanlab"))],
    }))  # fmt: skip
