"""Train S4D on pixel sequences. The defaults make s4d-digits, on one CPU core; a configuration gives other data.

    python scripts/train_s4d.py --out runs/s4d-digits
    python scripts/train_s4d.py --out runs/s4d-digits --export lscollapse/models/weights/s4d-digits
    python scripts/train_s4d.py --out runs/s4d-cifar10 --config configs/training/figure4.yaml

Killed and started again it continues from the last save and ends with the same weights, bit for bit. The exported folder
is a checkpoint that every command takes as --model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lscollapse.cli.terminal.paper import Bar
from lscollapse.core import allocation, config
from lscollapse.experiments import retrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the training state and the loss curve")
    parser.add_argument("--export", type=Path, help="write the checkpoint here instead of training")
    parser.add_argument("--config", type=Path, help="YAML file with fields of config.S4DTraining")
    parser.add_argument("--set", action="append", dest="settings", help="key=value, any of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="needs a C++ compiler")
    args = parser.parse_args()
    if args.export:
        print(json.dumps(retrain.export(args.out, args.export), indent=2))
        return
    allocation.keep_freed_memory()
    training = config.load(args.config, None, args.settings, config.S4DTraining)
    with Bar("training") as bar:
        retrain.train_net(training, args.out, bar, args.device, args.compile)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
