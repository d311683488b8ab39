"""Checkpoints for a trainer without an event loop: train, save meanwhile, go on where the last run ended.

    python sync_trainer.py --root checkpoints/sync

In: nothing; a small network learns a sine. Out: checkpoints below --root, and a digest of the last weights.
Interrupted or killed, and run again with the same command, it ends with the same digest. SIGTERM has it save
once more and end.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import time

import torch
from torch import nn

from dcp_async import AsyncSaveResponse, Every, RNGState, StagingOptions
from dcp_async.sync import CheckpointEngine


def train(root: str, *, steps: int, save_every: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optim": optimizer, "rng": RNGState()}  # the batches are drawn at random

    # With overlap save() returns before the copy is made; the next optimizer.step() waits for that by itself.
    staging, policy = StagingOptions(overlap=True), Every(steps=save_every)
    with CheckpointEngine(root, staging=staging, policy=policy) as engine:
        start = engine.load(state).next_step if engine.latest() else 1
        print(f"resumed behind step {start - 1}" if start > 1 else "fresh start", flush=True)

        uploading: AsyncSaveResponse | None = None
        last = max(start - 1, steps)
        with engine.preemption(signal.SIGTERM):  # a scheduler's: save at once, and leave
            for step in range(start, steps + 1):
                x = torch.rand(64, 1) * 6
                loss = nn.functional.mse_loss(model(x), torch.sin(x))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
                optimizer.step()

                if engine.should_save(step):
                    began = time.perf_counter()
                    response = engine.save(state, step=step)
                    held = (time.perf_counter() - began) * 1e3
                    print(f"step {step:>5}  loss {loss.item():.4f}  save() took {held:.1f} ms", flush=True)
                    if uploading is not None:  # the one before; it went on while the last steps ran
                        tell(uploading)
                    uploading = response
                if engine.preempted:
                    last = step
                    break
        if uploading is not None:
            tell(uploading)
    # Leaving the block waits for whatever is still under way: all that was saved is on the disk now.
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    outcome = "stopped behind" if engine.preempted else "done at"
    print(f"{outcome} step {last}, weights sha256 {hashlib.sha256(weights).hexdigest()}")


def tell(response: AsyncSaveResponse) -> None:
    """Wait until a checkpoint is on the disk and say so; a save that failed raises its SaveError here."""
    info = response.upload_completion.result(timeout=60)
    print(
        f"step {info.step:>5}  is on the disk: {info.checkpoint_id}, {info.nbytes / 1e6:.1f} MB", flush=True
    )


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--root", required=True, metavar="DIR", help="of the checkpoints; resumes if it holds any"
    )
    parser.add_argument("--steps", type=int, default=500, help="train until this step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that sums run in the same order each time, to the last bit
    try:
        train(options.root, steps=options.steps, save_every=options.save_every)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
