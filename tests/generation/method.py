"""METHOD sections 1 and 4, and a Llama-like decoder, in NumPy's float64: what every way to a token must give.

Of sepjax nothing is used but the names of settings and parameters.
"""

import dataclasses

import numpy as np

from sepjax.config import AttentionConfig, ModelConfig


def is_kept(attention: AttentionConfig, ids):
    """Which tokens stay visible for ever, sinks aside."""
    if attention.pattern == "fixed_interval":
        return (np.arange(len(ids)) + 1) % attention.interval == 0
    return np.isin(ids, attention.separator_ids) & (attention.pattern == "separator")


def _sees_kept(attention: AttentionConfig, layer):
    return not attention.kept_layers or layer in attention.kept_layers


def _reach(config: ModelConfig, attention: AttentionConfig, layer):
    """How far back a layer sees at most: by itself, or by the model's own window."""
    own = 0 if layer in config.full_layers else config.sliding_window
    given = attention.layer_reach[layer] if attention.layer_reach else 0
    return min(own or 2**40, given or 2**40)


def _window(attention: AttentionConfig, layer):
    return attention.layer_windows[layer] if attention.layer_windows else attention.window_size


class Mask:
    """Section 1."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, ids):
        self._config, self._attention, self._kept = config, attention, is_kept(attention, ids)

    def seen(self, layer, t):
        """What query t may see, itself last: numbers of tokens, their positions, and which of them it sees."""
        i, attention = np.arange(t + 1), self._attention
        stays = (i < attention.num_sinks) | (self._kept[: t + 1] & _sees_kept(attention, layer))
        sees = stays | (t - i <= _window(attention, layer) - 1) | (attention.pattern == "dense")
        return i, i, sees & (t - i < _reach(self._config, attention, layer))


@dataclasses.dataclass
class _Layer:
    """Section 4, of one layer."""

    sizes: tuple[int, int, int, int]  # a, s, w, c
    entries: list[int] = dataclasses.field(default_factory=list)
    kept: int = 0

    def append(self, t, is_kept):
        a, s, w, c = self.sizes
        self.entries.append(t)
        if len(self.entries) <= c:
            return
        end = len(self.entries) - w
        past = [i for i in self.entries[a + self.kept : end] if is_kept[i]] if s else []
        keep = [*self.entries[a : a + self.kept], *past]
        keep = keep[max(0, len(keep) - s) :]
        self.entries, self.kept = [*self.entries[:a], *keep, *self.entries[end:]], len(keep)


class Cache:
    """Section 4; layers of several windows hold as many entries more or less (docs/streaming.md)."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, ids):
        self._config, self._attention, self._kept = config, attention, is_kept(attention, ids)
        self.layers = [_Layer(self._sizes(layer)) for layer in range(config.num_layers)]
        self._now = 0

    def _sizes(self, layer):
        a, s, w = self._attention.num_sinks, self._attention.max_separators, self._attention.window_size
        size = self._attention.cache_size or 2 * (a + s + w)
        s, n = s * (self._attention.pattern != "sink_window"), _window(self._attention, layer)
        if self._attention.layer_windows and not (s and _sees_kept(self._attention, layer)):
            return a, 0, n, a + n
        return a, s, n, size + n - w

    def seen(self, layer, t):
        """As `Mask.seen`; tokens come in order."""
        if t > self._now:
            for each in self.layers:
                each.append(self._now, self._kept)
            self._now = t
        held, a = self.layers[layer], self._attention.num_sinks
        entries = np.array([*held.entries, t])
        positions = entries if self._attention.stream_positions == "absolute" else np.arange(len(entries))
        sees = positions[-1] - positions < _reach(self._config, self._attention, layer)
        if not _sees_kept(self._attention, layer):
            sees[a : a + held.kept] = False
        return entries, positions, sees


def log_probabilities(config: ModelConfig, params, ids, cache: Mask | Cache):
    """float64[T, V] of the token after each, one token at a time."""
    layers = [_of_layer(params["layers"], i) for i in range(config.num_layers)]
    keys, values = ([[] for _ in layers] for _ in range(2))
    embedding, out = np.asarray(params["embedding"]["embedding"], np.float64), []
    for t, token in enumerate(ids):
        x = embedding[token]
        for i, layer in enumerate(layers):
            normed = _norm(config, x, layer["attention_norm"]["scale"])
            names = "query", "key", "value"
            q, k, v = (np.einsum("d,dnh->nh", normed, layer["attention"][name]["kernel"]) for name in names)
            keys[i].append(k)
            values[i].append(v)
            entries, positions, sees = cache.seen(i, t)
            entries, positions = entries[sees], positions[sees]
            groups = config.num_heads // config.num_kv_heads
            k, v = (np.repeat(np.stack([x[i][j] for j in entries]), groups, axis=1) for x in (keys, values))
            q, k = _rotated(config, i, q[None], positions[-1:]), _rotated(config, i, k, positions)
            weights = np.exp(np.einsum("nh,snh->ns", q[0], k) * config.head_dim**-0.5)
            attended = np.einsum("ns,snh->nh", weights / weights.sum(axis=1, keepdims=True), v)
            x = x + np.einsum("nh,nhd->d", attended, layer["attention"]["out"]["kernel"])
            normed = _norm(config, x, layer["mlp_norm"]["scale"])
            gate, up = (normed @ layer["mlp"][name]["kernel"] for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
        out.append(_norm(config, x, params["final_norm"]["scale"]) @ embedding.T)
    logits = np.stack(out)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _of_layer(params, i):
    if isinstance(params, dict):
        return {name: _of_layer(x, i) for name, x in params.items()}
    return np.asarray(params[i], np.float64)


def _norm(config: ModelConfig, x, scale):
    return x / np.sqrt(np.mean(x * x) + config.norm_epsilon) * np.asarray(scale, np.float64)


def _rotated(config: ModelConfig, layer, x, positions):
    """x[T, heads, H], its halves against one another."""
    if layer in config.no_rope_layers:
        return x
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * config.rope.base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
    return np.concatenate(turned, axis=-1)
