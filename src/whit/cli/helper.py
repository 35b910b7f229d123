"""A rank of a run that another process started: what to do on stdin, one line of JSON; "ready" on stdout.

It ends when its stdin does, which is when the process that started it has ended in whatever way.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback

import torch
import torch.distributed as dist

from whit.cli.ranks import LOST
from whit.devices import device_named
from whit.errors import RankError, WhitError
from whit.models.open import open_model
from whit.pipeline.helper import help_with
from whit.ranks import joined


def main() -> int:
    """Work until there is no more; the exit status."""
    setup = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    torch.set_num_threads(setup["threads"])
    try:
        device = device_named(setup["device"], setup["rank"])
        model = open_model(setup["model"])
        print("ready", flush=True)
        with joined(dist.FileStore(setup["store"], setup["size"]), setup["rank"], setup["size"]) as ranks:
            help_with(model, ranks, device)
    except RankError:
        return LOST
    except WhitError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(LOST)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the thread waits for stdin and would be waited for
