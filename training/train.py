"""`vidworld train` as a script, for launchers that start a file on every process.

torchrun --standalone --nproc-per-node 8 training/train.py configs/cr5.yaml --out runs/cr5
accelerate launch --num_processes 8 training/train.py configs/cr5.yaml --out runs/cr5
"""

import sys

from vidworld.cli import run

if __name__ == "__main__":
    raise SystemExit(run(["train", *sys.argv[1:]]))
