"""What every command line shares: errors as one line and a hint, and the choice of the device."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cache.errors import ConfigError, VitaCacheError
from configs.schema import Device, Precision

INTERRUPTED = 130


def run_command(command: Callable[[], int]) -> int:
    """Run a command; print errors that users can mend as one line with a hint, status 2, no traceback."""
    try:
        return command()
    except VitaCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        return 0
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def device_name(device: Device) -> str:
    """Resolve auto; raises ConfigError when CUDA is asked for and missing."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("CUDA is not available here", where="setting device", hint="use device=auto or device=cpu")
    return "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"


def precision_name(precision: Precision, device: str) -> str:
    """Resolve auto: bfloat16 on CUDA, float32 on CPU."""
    if precision is not Precision.auto:
        return str(precision.value)
    return "bfloat16" if device == "cuda" else "float32"
