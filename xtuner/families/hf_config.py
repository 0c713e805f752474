"""Reads (with validation) and writes the fields of a Hugging Face `config.json` that most families share."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import short_repr
from xtuner.families.network import DecoderConfig, RopeScaling

FIELDS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip
# rope_scaling: kind → numbers that belong to it, in addition to factor and original_max_position_embeddings
SCALING_FIELDS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
}
ROTARY = "rotary"  # its name in early InternLM2, whose scalings need no factor
# Limits beyond all existing networks. They bound the work for wrong values: each layer takes a millisecond to build.
_LIMITS = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1000,
    "num_attention_heads": 2**13, "num_key_value_heads": 2**13, "head_dim": 2**13, "max_position_embeddings": 2**40,
}  # fmt: skip
_LONGROPE = (
    "longrope has a factor for each frequency and another table beyond the first context, so that a token's angle "
    "depends on how long its document becomes"
)


@dataclass(frozen=True)
class Reader:
    """Reads untrusted values of a `config.json`. `null` counts as absent.

    `where` is the prefix of keys in messages.
    """

    hf: dict[str, Any]
    where: str

    def wrong(self, key: str, what: str) -> ConfigError:
        return ConfigError(what, where=f"{self.where}{key}", why="no network can be built from it")

    def size(self, key: str, default: int | None = None) -> int:
        """An integer in the range of this size. With a default, 0 means the default."""
        value = self.hf.get(key)
        if default is not None and (value is None or value == 0):
            return default
        return self.whole(key, value, _LIMITS[key])

    def whole(self, key: str, value: Any, limit: int) -> int:
        """An integer from 1 to `limit`."""
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if type(whole) is not int or not 1 <= whole <= limit:
            raise self.wrong(key, f"{key} = {short_repr(value)} is not an integer from 1 to {limit:,}")
        return whole

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.hf.get(key)
        return default if value is None else self.above_0(key, value)

    def above_0(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(key, f"{key} = {short_repr(value)} is not a number above 0")
        return float(value)

    def only(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.hf.get(key, default)
        if not any(type(value) is type(known) and value == known for known in allowed):
            what = f"{key} = {short_repr(value)} is not supported"
            raise ConfigError(what, where=f"{self.where}{key}", why="the network would differ")
        return value

    def token(self, key: str, default: int) -> Any:
        """A token id, the first of a list of ids, or None."""
        ids = self.hf.get(key, default)
        value = ids[0] if isinstance(ids, list) and ids else ids
        if value is not None and (type(value) is not int or not -(2**31) <= value < 2**31):
            raise self.wrong(key, f"{key} = {short_repr(ids)} is not the id of a token")
        return value

    def token_list(self, key: str, alone: bool = False) -> tuple[int, ...]:
        """A list of token ids. A single one counts only if `alone`."""
        ids = self.hf.get(key)
        found = ids if isinstance(ids, list) else [ids] if alone and ids is not None else []
        if any(type(i) is not int or not -(2**31) <= i < 2**31 for i in found):
            raise self.wrong(key, f"{key} = {short_repr(ids)} is not a list of ids of tokens")
        return tuple(found)

    def padding(self, vocabulary: int) -> int | None:
        value = self.hf.get("pad_token_id")
        if value is not None and (type(value) is not int or not -vocabulary <= value < vocabulary):
            raise self.wrong("pad_token_id", f"pad_token_id = {short_repr(value)} is not below {vocabulary:,}")
        return value

    def same(self, *keys: str) -> Any:
        """The value of a field that releases name differently; None if absent.

        Raises: ConfigError if two of the names have different values.
        """
        found = [key for key in keys if self.hf.get(key) is not None]
        for other in found[1:]:
            self.require_equal(found[0], self.hf[found[0]], other, self.hf[other])
        return self.hf[found[0]] if found else None

    def require_equal(self, key: str, value: Any, other: str, found: Any) -> None:
        """Raises: ConfigError if two fields that mean the same have different values."""
        if value != found:
            raise ConfigError(
                f"{key} = {short_repr(value)} contradicts {other} = {short_repr(found)}",
                where=f"{self.where}{other}",
                why="they describe two networks, of which only one belongs to the weights",
                do="correct the field that is wrong; the model's own config.json has both right",
            )

    def flag(self, *keys: str, default: bool = False) -> bool:
        """True or False under any of these names."""
        value = self.same(*keys)
        if value is None:
            return default
        if type(value) is not bool:
            key = next(key for key in keys if self.hf.get(key) is not None)
            raise self.wrong(key, f"{key} = {short_repr(value)} is not true or false")
        return value

    def window(self, key: str) -> int | None:
        """Tokens of a sliding window; None if absent."""
        value = self.hf.get(key)
        return None if value is None else self.whole(key, value, _LIMITS["max_position_embeddings"])

    def with_defaults(self, **defaults: Any) -> "Reader":
        """The same fields; those that are absent have these values, as in the family's own code."""
        return Reader({**defaults, **self.hf}, self.where)

    def inner(self, key: str) -> dict[str, Any]:
        """A nested object; empty if absent."""
        value = self.hf.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, f"{key} = {short_repr(value)} is not an object")
        return value


def read_network(
    read: Reader, attention_bias: bool = False, ropes: Collection[str] = ("linear", "dynamic"), **more: Any
) -> DecoderConfig:
    """A network from the shared fields.

    Args:
        attention_bias: whether q, k, v and attention's output have biases.
        ropes: the kinds of `rope_scaling` that the family has.
        more: fields of `DecoderConfig` that the family reads itself.

    Raises: ConfigError for unsupported features, and for values that do not describe a network.
    """
    hf = read.hf
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [key for key in needed if key not in hf]:
        raise ConfigError(f"config.json lacks {', '.join(absent)}", where=read.where.rstrip(": ."))
    read.only("hidden_act", ("silu", "swish"), "silu")
    for key in ("tie_word_embeddings", "mlp_bias"):
        if key not in more:
            read.only(key, (False,), False)
    heads, hidden, vocabulary = read.size("num_attention_heads"), read.size("hidden_size"), read.size("vocab_size")
    kv_heads = read.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise read.wrong("num_key_value_heads", f"{heads} heads cannot share {kv_heads} key-value heads")
    if not hf.get("head_dim") and hidden % heads:
        raise read.wrong("hidden_size", f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = read.size("head_dim", hidden // heads)
    if head_dim % 2:
        at = "head_dim" if hf.get("head_dim") else "hidden_size"
        raise read.wrong(at, f"head_dim {head_dim} is odd, and rotary positions need pairs")
    theta, scaling = _read_rope(read, ropes)
    if scaling and scaling.kind == "yarn" and theta <= 1:
        raise read.wrong("rope_theta", f"rope_theta = {theta} is not above 1, which yarn needs")
    if head_dim < 4 and scaling and scaling.kind == "dynamic":  # its base is scaled with the exponent D / (D - 2)
        raise read.wrong("rope_scaling", f"dynamic rope scaling is undefined for head_dim {head_dim}")
    shared: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size"),
        num_layers=read.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=read.size("max_position_embeddings", 2048),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        initializer_range=read.number("initializer_range", 0.02),
        bos_token_id=read.token("bos_token_id", 1),
        eos_token_id=read.token("eos_token_id", 2),
        eos_list=read.token_list("eos_token_id"),
        pad_token_id=read.padding(vocabulary),
    )
    return DecoderConfig(**{**shared, **more})


def read_tied(read: Reader) -> dict[str, bool]:
    """The field of `DecoderConfig` for families whose embedding may be the weight of the output layer."""
    return {"tie_word_embeddings": read.flag("tie_word_embeddings")}


def write_network(c: DecoderConfig, dtype: str, expresses: Collection[str] = ()) -> dict[str, Any]:
    """The shared fields.

    Args:
        expresses: which of the fields of `DecoderConfig.special_features` the family's `config.json` has.

    Raises: ConfigError for a network with others.
    """
    if found := [what for field, what in c.special_features().items() if field not in expresses]:
        raise ConfigError(
            f"the network has {', '.join(found)}, which this form of config.json cannot express",
            where="--layout",
            why="what loads the folder would compute something else",
            do="leave out --layout: the model's own family can (a family of yours says so with `expresses`)",
        )
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": write_scaling(c.rope_scaling),
        "use_cache": True,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": [*c.eos_list] or c.eos_token_id,
        "pad_token_id": c.pad_token_id,
        "torch_dtype": dtype,
    }


def _read_rope(read: Reader, kinds: Collection[str]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta`, `rope_parameters` (transformers 5) or `rotary` (early InternLM2)."""
    new, old, own = (read.inner(key) for key in ("rope_parameters", "rotary", "rope_scaling"))
    bases = {f"{prefix}rope_theta": values.get("rope_theta")
             for prefix, values in (("", read.hf), ("rope_parameters.", new), ("rope_scaling.", own))}  # fmt: skip
    found = [(key, base) for key, base in bases.items() if base is not None]
    for key, base in found[1:]:
        read.require_equal(*found[0], key, base)
    if own and new:
        for name in dict.fromkeys(("rope_type", "factor", *sorted((own.keys() & new.keys()) - {"type"}))):
            read.require_equal(
                f"rope_scaling.{name}", _rope_value(own, name), f"rope_parameters.{name}", _rope_value(new, name)
            )
    if layered := next((key for key, value in new.items() if isinstance(value, dict)), None):
        what = f"rope_parameters differ between layers: {short_repr(layered)} has its own"
        raise ConfigError(what, where=f"{read.where}rope_parameters", why="all layers rotate by the same angles here")
    for key, values in (("partial_rotary_factor", read.hf), ("rope_parameters.partial_rotary_factor", new)):
        if (part := values.get("partial_rotary_factor")) not in (None, 1):
            what = f"{key} = {short_repr(part)} is not supported"
            raise ConfigError(what, where=f"{read.where}{key}", why="complete heads are rotated here")
    theta = read.above_0(*found[0]) if found else read.above_0("rotary.base", old.get("base") or 10000)
    at, values = next(((k, v) for k, v in (("rope_scaling", own), ("rope_parameters", new)) if v), (ROTARY, old))
    return theta, read_scaling(read, values, kinds, at)


def read_scaling(
    read: Reader, values: dict[str, Any], kinds: Collection[str], at: str = "rope_scaling"
) -> RopeScaling | None:
    """The contents of `rope_scaling`.

    Args:
        kinds: those that are supported.
        at: the key of `values`, for messages.

    Raises: ConfigError.
    """
    if values.get("type") and values.get("rope_type"):
        read.require_equal(f"{at}.type", values["type"], f"{at}.rope_type", values["rope_type"])
    kind: Any = _rope_value(values, "rope_type")
    factor = values.get("factor")
    if (kind in ("default", "origin") and not factor) or (at == ROTARY and kind == "linear" and factor is None):
        return None
    if not (values.get("type") or values.get("rope_type")):
        raise read.wrong(f"{at}.rope_type", f"{at} has factor = {short_repr(factor)} and no rope_type")
    if kind not in kinds:
        raise ConfigError(
            f"rope scaling {short_repr(kind)} is not supported",
            where=f"{read.where}{at}",
            why=_LONGROPE if kind in ("longrope", "su") else "",
            do=f"supported are: {', '.join(kinds)}",
        )
    found: dict[str, Any] = {}
    if kind in SCALING_FIELDS:
        key, limit = "original_max_position_embeddings", _LIMITS["max_position_embeddings"]
        inner, outer = values.get(key), read.hf.get(key)
        if inner is not None and outer is not None:
            read.require_equal(f"{at}.{key}", inner, key, outer)
        context = inner or outer or read.size("max_position_embeddings", 2048)
        found[key] = read.whole(f"{at}.{key}" if inner else key, context, limit)
        for name in SCALING_FIELDS[kind]:
            if values.get(name) is not None:
                found[name] = read.above_0(f"{at}.{name}", values[name])
    if kind == "yarn" and (truncate := values.get("truncate")) is not None:
        if type(truncate) is not bool:
            raise read.wrong(f"{at}.truncate", f"{at}.truncate = {short_repr(truncate)} is not a bool")
        found["truncate"] = truncate
    needed = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    if absent := next((name for name in needed if values.get(name) is None), None):
        raise read.wrong(f"{at}.{absent}", f"{at} of type llama3 has no {absent}")
    if at == ROTARY and kind == "dynamic" and factor is None:
        factor = 1.0
    scaling = RopeScaling(kind, read.above_0(f"{at}.factor", factor), **found)
    if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        what = f"{at}.high_freq_factor = {scaling.high_freq_factor} is not above low_freq_factor"
        raise read.wrong(f"{at}.high_freq_factor", what)
    return scaling


def _rope_value(values: dict[str, Any], name: str) -> Any:
    """A field of `rope_scaling` or `rope_parameters`; its kind has two names."""
    if name == "rope_type":
        return values.get("type") or values.get("rope_type") or "default"
    return values.get(name)


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` for a `config.json`."""
    if scaling is None:
        return None
    if scaling.kind not in SCALING_FIELDS:
        return {"type": scaling.kind, "factor": scaling.factor}
    found = {"rope_type": scaling.kind, "factor": scaling.factor}
    names = ("original_max_position_embeddings", *SCALING_FIELDS[scaling.kind])
    found |= {name: value for name in names if (value := getattr(scaling, name)) is not None}
    return found if scaling.truncate else found | {"truncate": False}
