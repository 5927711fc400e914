"""Flower's client: trains one client's examples with PyTorch; model and data stay in the actor between calls."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from pytorch_models import images, model_of
from torch.nn import functional
from workload import BATCH, EXAMPLES, LEARNING_RATE, Workload, load

app = ClientApp()


@cache
def _loaded(data: str, model: str, threads: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.set_num_threads(threads)
    workload: Workload = load(Path(data), model)
    return model_of(workload), images(workload.x), torch.from_numpy(workload.y)


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    module, x, y = _loaded(config["data"], config["model"], config["threads"])
    client = config["client"]
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    for start in range(0, EXAMPLES, BATCH):
        batch = slice(start, start + BATCH)
        optimizer.zero_grad()
        functional.cross_entropy(module(x[client, batch]), y[client, batch]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": EXAMPLES})}
    return Message(content=RecordDict(content), reply_to=message)
