"""The command `python -m sepjax.bench.mesh`; see `sepjax.bench.mesh`."""

import dataclasses

from absl import flags

from sepjax.bench.mesh import PARTS, Settings, main
from sepjax.bench.mesh.training import AXES as ALL_AXES
from sepjax.command.flags import run_main, whole_numbers
from sepjax.config import ConfigError, nearest

if __name__ == "__main__":
    DEFAULT = Settings()
    CHOSEN = flags.DEFINE_list("parts", list(PARTS[:-1]), f"of {', '.join(PARTS)}")
    CONFIGS = flags.DEFINE_list("configs", list(DEFAULT.training.configs), "files in configs/, without .py")
    AXES = flags.DEFINE_list("axes", list(DEFAULT.training.axes), "meshes, each of one axis over all devices")
    LENGTH = flags.DEFINE_integer("length", DEFAULT.training.length, "tokens of a row in training", lower_bound=1)
    LONG = flags.DEFINE_integer("long_length", DEFAULT.training.long_length, "the same on `context`", lower_bound=1)
    TOKENS = flags.DEFINE_integer("tokens", DEFAULT.training.tokens, "of a device's micro-batch", lower_bound=1)
    LENGTHS = flags.DEFINE_list("lengths", list(map(str, DEFAULT.attention.lengths)), "tokens of a row of attention")
    LONGEST = flags.DEFINE_list("longest", list(map(str, DEFAULT.training.longest)), "tokens of a row in that part")
    SECONDS = flags.DEFINE_float("seconds", DEFAULT.training.seconds, "for the loops of a figure", lower_bound=0)
    SCAN = flags.DEFINE_bool(
        "scan_layers", DEFAULT.training.scan_layers, "compile one layer; --noscan_layers: as configs say"
    )
    JSON = flags.DEFINE_string("json", None, "file for all figures and settings")

    def _known(flag: str, given: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in known:
                raise ConfigError(f"--{flag}={name} is none of {', '.join(known)}{nearest(name, known)}")
        return tuple(given)

    def _main() -> None:
        training = dataclasses.replace(
            DEFAULT.training,
            configs=tuple(CONFIGS.value),
            axes=_known("axes", AXES.value, ALL_AXES),
            length=LENGTH.value,
            long_length=LONG.value,
            longest=whole_numbers("longest", LONGEST.value),
            tokens=TOKENS.value,
            seconds=SECONDS.value,
            scan_layers=SCAN.value,
        )
        attention = dataclasses.replace(DEFAULT.attention, lengths=whole_numbers("lengths", LENGTHS.value))
        generation = dataclasses.replace(DEFAULT.generation, config=CONFIGS.value[-1])
        main(_known("parts", CHOSEN.value, PARTS), Settings(training, attention, generation), JSON.value)

    run_main(_main)
