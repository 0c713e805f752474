"""The rates of mmengine 0.10.7, by its own schedulers: test_schedule.py runs this in a process of its own.

In on stdin: JSON lines {"lr", "schedulers": [config, …], "epochs", "epoch_length"}. Out: a line each, the rate of every
iteration and the error that ended them ("" for none). As its Runner does: built by the registry with the run's end for
`end`, stepped after each iteration.
"""

import json
import sys
import warnings

import mmengine.optim  # noqa: F401  registers the schedulers
import torch
from mmengine.registry import PARAM_SCHEDULERS

warnings.simplefilter("ignore")
for line in sys.stdin:
    case = json.loads(line)
    length, epochs = case["epoch_length"], case["epochs"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=case["lr"])
    rates: list[float] = []
    error = ""
    try:
        schedulers = []
        for config in case["schedulers"]:
            config.setdefault("end", epochs if config["by_epoch"] else epochs * length)
            given = {"optimizer": optimizer, "epoch_length": length}
            schedulers.append(PARAM_SCHEDULERS.build(config, default_args=given))
        for _ in range(epochs * length):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    except (ValueError, AssertionError, ArithmeticError, TypeError) as e:
        error = type(e).__name__
    print(json.dumps({"rates": rates, "error": error}))
