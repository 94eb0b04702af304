"""The mesh, and one table from logical axes to mesh axes.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` also the parameters, `tensor` splits heads, feed-forward and
vocabulary, `context` the sequence. Everything outside kernels is plain `jax.jit` over sharded arrays; the compiler puts
the collectives in. Multi-host runs need nothing else: `jax.distributed.initialize()` comes first and
`jax.make_mesh` sees all devices.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sepjax.config import ConfigError, MeshConfig, first_line

# logical axis -> mesh axes. `embed` is a parameter's model dimension, `hidden` the same dimension of activations.
# `rows of fsdp` is the batch where the devices of `fsdp` have the same rows, and a part of `embed` each.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "rows of fsdp": ("data",),
    "length": ("context",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "hidden": (),
    None: (),
}

# last parts of a parameter's path -> logical axes. Stacked layers have one more axis, in front, which stays whole.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding/embedding": ("vocab", "embed"),
    "position_embedding/embedding": (None, "embed"),
    "head/embedding": ("vocab", "embed"),
    "query/kernel": ("embed", "heads", None),
    "key/kernel": ("embed", "heads", None),
    "value/kernel": ("embed", "heads", None),
    "query/bias": ("heads", None),
    "key/bias": ("heads", None),
    "value/bias": ("heads", None),
    "out/kernel": ("heads", None, "embed"),
    "out/bias": ("embed",),
    "up/kernel": ("embed", "mlp"),
    "gate/kernel": ("embed", "mlp"),
    "down/kernel": ("mlp", "embed"),
    "up/bias": ("mlp",),
    "gate/bias": ("mlp",),
    "down/bias": ("embed",),
    "attention_norm/scale": (None,),
    "attention_norm/bias": (None,),
    "mlp_norm/scale": (None,),
    "mlp_norm/bias": (None,),
    "attention_out_norm/scale": (None,),
    "attention_out_norm/bias": (None,),
    "mlp_out_norm/scale": (None,),
    "mlp_out_norm/bias": (None,),
    "query_norm/scale": (None,),
    "key_norm/scale": (None,),
    "final_norm/scale": (None,),
    "final_norm/bias": (None,),
    "norm/scale": (None,),  # the gate's
    "norm/bias": (None,),
}
# The scales of matrices of 8 bits lie as the outputs that they are of.
PARAMETER_AXES |= {f"{_name}/scales": ("vocab",) for _name in ("embedding", "head")}
PARAMETER_AXES |= {
    f"{_name}/scales": PARAMETER_AXES[f"{_name}/bias"]
    for _name in ("query", "key", "value", "out", "gate", "up", "down")
}
# Low-rank adapters lie as the matrix does that they are added to: A as its inputs, B as its outputs.
for _name, _inputs in {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}.items():
    _axes = PARAMETER_AXES[f"{_name}/kernel"]
    PARAMETER_AXES |= {f"{_name}/lora_a": (*_axes[:_inputs], None), f"{_name}/lora_b": (None, *_axes[_inputs:])}


def join_cluster() -> None:
    """Connects this process with the others of a TPU pod, Slurm, Kubernetes or MPI job, where JAX detects one.

    Elsewhere the variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say
    it. Must come before anything touches a device. On a single machine it does nothing.

    Raises:
      ConfigError: the variables are incomplete or no numbers.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if len(given) > 1:
        if len(given) < len(names) or not all(given[name].isdecimal() for name in names[1:]):
            raise ConfigError(f"to join processes set all of {', '.join(names)}, the last two to numbers; got {given}")
        jax.distributed.initialize(given[names[0]], int(given[names[1]]), int(given[names[2]]))
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):  # JAX's way of saying that it sees no cluster
            raise


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor`, `context` over all devices (or those given).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not lie on their torus.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {sizes} does not fit {len(devices)} devices: the sizes must multiply to that number; "
            "set one axis to -1 to take what is left"
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)
    except NotImplementedError as error:  # a TPU's torus, of which every mesh axis takes whole axes
        raise ConfigError(
            f"mesh {sizes} does not lie on the {len(devices)} chips: {first_line(error)}; make "
            "each size a product of sides of the chips' grid"
        ) from error


def check_batch(mesh: Mesh, rows: int) -> None:
    """Raises `ConfigError` when `rows` do not split evenly over the axes that share the batch."""
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if rows % ways:
        raise ConfigError(
            f"a (micro-)batch of {rows} rows does not split over {ways} devices (mesh {', '.join(RULES['batch'])}); "
            "change data.batch_size, optimizer.accumulation_steps or the mesh to fit"
        )


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Raises `ConfigError` when the query heads do not split evenly over `tensor`."""
    parts = _ways(mesh, "heads")
    if num_heads % parts:
        raise ConfigError(
            f"model.num_heads={num_heads} does not split over mesh.tensor={parts} devices; choose one that divides it"
        )


def check_length(mesh: Mesh, length: int) -> None:
    """Raises `ConfigError` when a row does not split into an early and a late chunk for each device of `context`."""
    parts = _ways(mesh, "length")
    if parts > 1 and length % (2 * parts):
        raise ConfigError(
            f"data.sequence_length={length} does not split over mesh.context={parts} devices: each gets two chunks of "
            f"a row, so it must be a multiple of {2 * parts}"
        )


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters, or for any tree that holds such trees (optimizer moments).

    Leaves whose path names no parameter (step counters) are replicated. An axis that does not divide is left whole.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        axes = PARAMETER_AXES.get("/".join(names[-2:]), ())
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        return NamedSharding(mesh, _spec(mesh, axes, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How [B, T] arrays of a batch lie on the mesh."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


@dataclasses.dataclass(frozen=True)
class RowShare:
    """The rows of a batch that a process reads: those that its devices hold some part of.

    Processes whose devices split the same rows (over `tensor` or `context`) read the same ones.

    Attributes:
      index: of this process's rows among the `count` shares, which are disjoint and of one size.
      count: shares of the batch.
      ranges: [first, last) rows, in order.
    """

    index: int
    count: int
    ranges: tuple[tuple[int, int], ...]

    def place(self, x: Any, sharding: NamedSharding) -> jax.Array:
        """This process's rows [B / count, T] as its part of an array [B, T] over the whole mesh."""
        begins = [sum(last - first for first, last in self.ranges[:i]) for i in range(len(self.ranges))]

        def part(index: Any) -> Any:
            first, last, _ = index[0].indices(len(x) * self.count)
            at = next(b + first - f for b, (f, end) in zip(begins, self.ranges, strict=True) if f <= first < end)
            return x[at : at + last - first, index[1]]

        return jax.make_array_from_callback((len(x) * self.count, x.shape[1]), sharding, part)


def row_share(mesh: Mesh, rows: int, process: int | None = None) -> RowShare:
    """Which of a batch's rows a process (None: this one) reads.

    Raises:
      ConfigError: some processes would share a part of their rows.
    """
    length = _ways(mesh, "length")
    held: dict[int, set[tuple[int, int]]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((rows, length)).items():
        held.setdefault(device.process_index, set()).add(index[0].indices(rows)[:2])
    shares = sorted({tuple(sorted(ranges)) for ranges in held.values()})
    sizes = {sum(last - first for first, last in ranges) for ranges in shares}
    if len(sizes) > 1 or sizes.pop() * len(shares) != rows:
        raise ConfigError(
            f"{len(held)} processes hold rows that overlap in part on mesh {dict(mesh.shape)}; "
            f"make data * fsdp = {_ways(mesh, 'batch')} a multiple or a divisor of the number of processes"
        )
    mine = tuple(sorted(held[jax.process_index() if process is None else process]))
    return RowShare(shares.index(mine), len(shares), mine)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation lies on the ambient mesh (`jax.set_mesh`); without one, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(mesh, axes, x.shape))


def whole(x: jax.Array) -> jax.Array:
    """An array that a program gives, told to be whole on every device of the ambient mesh; without one, as it is.

    Left to the compiler, what is made of scores is split by tokens as they are, unlike what the program was given; and
    the next program is compiled for each of the two.
    """
    return constrain(x, *(None,) * x.ndim)


def manual_over_mesh(
    op: Callable[..., Any], in_axes: tuple[PartitionSpec, ...], out_axes: PartitionSpec
) -> Callable[..., Any]:
    """Runs `op` on each device's own rows, tokens and heads, so that what it loops over is its own data.

    Args:
      op: takes arrays or pytrees of arrays.
      in_axes: logical axes of each argument ("batch", "length", "heads", None); a pytree's leaves all share its entry.
      out_axes: logical axes of the result.

    Returns:
      `op` under `jax.shard_map` on the ambient mesh, or `op` itself when there is none. A logical axis that some
      argument cannot divide stays whole everywhere.
    """
    if on_one_device():
        return op
    mesh = jax.sharding.get_abstract_mesh()

    def sharded(*args: Any) -> Any:
        shapes = [(axes, leaf.shape) for axes, arg in zip(in_axes, args, strict=True) for leaf in jax.tree.leaves(arg)]

        def physical(axes: PartitionSpec) -> PartitionSpec:
            whole = {name for a, shape in shapes for name, n in zip(a, shape, strict=False) if n % _ways(mesh, name)}
            return PartitionSpec(*(RULES[None if name in whole else name] or None for name in axes))

        specs = tuple(physical(axes) for axes in in_axes)
        run = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=physical(out_axes), check_vma=False)
        return run(*args)

    return sharded


def on_one_device() -> bool:
    """Whether there is no ambient mesh (`jax.set_mesh`), or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def placed_like[T](params: Any, state: T) -> T:
    """Fresh arrays put where parameters were put, if that is one device (loaded parameters are put there).

    What a program gives lies there, too. Left where they happen to be, fresh arrays would have programs of their own,
    compiled beside those for what comes back.
    """
    sharding = _sharding_like(params)
    return state if sharding is None else jax.device_put(state, sharding)


def shapes_placed_like[T](params: Any, shapes: T) -> T:
    """Shapes of arrays that `placed_like` puts somewhere, for a program that is compiled before there are any."""
    sharding = _sharding_like(params)
    if sharding is None:
        return shapes
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _sharding_like(params: Any) -> Any:
    leaf = jax.tree.leaves(params)[0]
    if not leaf.committed or len(leaf.sharding.device_set) > 1:
        return None
    if isinstance(leaf.sharding, NamedSharding):  # of a mesh of one device
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.sharding.SingleDeviceSharding(*leaf.sharding.device_set)


def ways(name: str) -> int:
    """Parts that the ambient mesh (`jax.set_mesh`) splits a logical axis into; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(mesh, name)


def _ways(mesh: Any, name: str | None) -> int:
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def _spec(mesh: Any, axes: Sequence[str | None], shape: tuple[int, ...]) -> PartitionSpec:
    """Without what is whole at its end, as programs give it back: JAX compiles for each way to write it."""
    parts = [RULES[name] or None if n % _ways(mesh, name) == 0 else None for name, n in zip(axes, shape, strict=True)]
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)
