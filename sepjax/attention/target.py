"""The device that the code being traced will run on: where a kernel is chosen, and why one cannot serve.

Under `jax.set_mesh` it is the mesh's, so that a program can be compiled here for devices that are elsewhere
(`jax.experimental.topologies`); otherwise the default device.
"""

import dataclasses

import jax

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the names of GPUs with compute capability 9.0


@dataclasses.dataclass(frozen=True)
class Target:
    """A device in words.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the vendor's name, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
      num_cores: of a GPU its SMs; 0 where the device does not tell.
      capability: of an NVIDIA GPU, such as "9.0"; "" for other devices, and for GPUs whose capability is unknown.
    """

    platform: str
    kind: str
    num_cores: int = 0
    capability: str = ""

    def __str__(self) -> str:
        capability = f", compute capability {self.capability}" if self.capability else ""
        return f"{self.platform} ({self.kind}{capability})"


def target() -> Target:
    """The device that is traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform == jax.default_backend():
        real = jax.devices()[0]
        return Target(
            real.platform,
            real.device_kind,
            getattr(real, "core_count", 0),
            str(getattr(real, "compute_capability", "")),
        )
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    capability = "9.0" if any(name in device.device_kind for name in _HOPPER) else ""
    return Target(platform, device.device_kind, device.num_cores or 0, capability)
