"""What has changed in a config between a checkpoint and its resume, and what that means."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What training reads; other names of a config are helpers whose effect shows in these.
READ = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "default_hooks", "randomness")
# Changes that no weight feels. Data are compared by their contents, not by where they lie.
HARMLESS = (
    "model.activation_checkpointing", "model.attention",
    "model.pretrained_model_name_or_path", "model.path", "model.llm",
    "optim_wrapper.accumulative_counts",  # packs an iteration of all ranks are compared themselves
    "train_dataloader.num_workers", "train_dataloader.dataset.dataset_cfg.folder",
    "train_dataloader.dataset.dataset_cfg.data_order_path", "train_dataloader.dataset.dataset_cfg.cache_dir",
    "default_hooks.logger", "default_hooks.timer",
    "default_hooks.checkpoint", "train_cfg.max_skipped", "randomness.deterministic",
)  # fmt: skip
# Changes with which the checkpoint cannot be loaded.
IMPOSSIBLE = ("optim_wrapper.optimizer.type", "optim_wrapper.states",
              "model.vocab_size", "model.hidden_size", "model.intermediate_size",
              "model.num_hidden_layers", "model.num_attention_heads", "model.num_key_value_heads", "model.head_dim",
              "model.bias")  # fmt: skip


@dataclass(frozen=True)
class Change:
    """`kind` is "harmless", "changes the result" or "impossible"."""

    key: str
    before: Any
    now: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} → {self.now!r}"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Differences of two resolved configs, in the order of their keys."""
    old, new = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            found.append(Change(key, old.get(key), new.get(key), _kind(key)))
    return found


def _kind(key: str) -> str:
    def under(prefixes: tuple[str, ...]) -> bool:
        return any(f"{key}.".startswith(f"{p}.") for p in prefixes)

    return "impossible" if under(IMPOSSIBLE) else "harmless" if under(HARMLESS) else "changes the result"


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield key, value
        else:
            for k, v in items:
                yield from walk(f"{key}.{k}", v)

    for name in READ:
        if name in config:
            yield from walk(name, config[name])
