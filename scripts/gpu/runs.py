"""Whole runs on a card, and what may happen to them: streamed, out of memory, a process killed, watched while training."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

from gpu.setting import Setting, compared, said
from gpu.smoke import Found


def command(s: Setting) -> Found:
    """What `lscollapse sweep-lambda` does, loading, bounds, probes and the files of the run folder included."""
    from lscollapse.experiments.paper import sweep_lambda

    out = s.scratch / "sweep"
    taken, rows = s.seconds(lambda: sweep_lambda(s.config(), out))
    counted = {"statuses": _counts(rows, "status"), "dtypes": _counts(rows, "dtype")}
    return f"{taken:.1f} s, {len(rows):,} rows; {counted['dtypes']}", {"seconds": taken} | counted


def _counts(rows: Any, column: str) -> dict[str, int]:
    return {str(name): int(n) for name, n in rows[column].value_counts().items()}


def ablate(s: Setting) -> Found:
    """What `lscollapse ablate-gating` does: two of its four arms run in float64."""
    from lscollapse.experiments.paper import ablate_gating

    taken, rows = s.seconds(lambda: ablate_gating(s.config(), s.scratch / "ablate"))
    numbers = {"seconds": taken, "statuses": _counts(rows, "status"), "dtypes": _counts(rows, "dtype")}
    return f"{taken:.1f} s; {numbers['statuses']}", numbers


def streaming(s: Setting) -> Found:
    """Weights from the file layer by layer against weights in memory; how fast they come, and how much of that is hidden."""
    import torch

    from lscollapse.instrument.forward import measure_pass

    held, (streamed, _) = s.adapter()[0], s.adapter(stream="always")
    arms, ids = s.arms(), s.ids()

    def blocks() -> int:
        for layer in range(streamed.n_layers):
            streamed.own_block(layer, torch.float32)
        return sum(t.numel() * t.element_size() for k in range(streamed.n_layers) for t in streamed.held(k).values())

    measure_pass(held, ids, arms, torch.float32, batched=True)
    resident, expected = s.seconds(lambda: measure_pass(held, ids, arms, torch.float32, batched=True))
    bringing, size = s.seconds(blocks)
    taken, rows = s.seconds(lambda: measure_pass(streamed, ids, arms, torch.float32, batched=True))
    difference = compared(rows, expected)
    hidden = max(0.0, 1.0 - max(0.0, taken - resident) / bringing)
    numbers = difference | {
        "resident": resident, "streamed": taken, "bringing": bringing, "GB/s": size / 1e9 / bringing, "hidden": hidden,
    }  # fmt: skip
    if difference["not equal"]:
        raise AssertionError(said(difference))
    return f"{said(difference)}; {size / 1e9 / bringing:.2f} GB/s, {100 * hidden:.0f} % of it hidden", numbers


def out_of_memory(s: Setting) -> Found:
    """A tile that does not fit, in halves, against the whole tile; on a CPU the first failure is made by hand."""
    import torch

    from lscollapse.instrument.forward import measure_pass
    from lscollapse.runs.memory import in_halves, release

    adapter, _ = s.adapter()
    ids, arms, calls, failures = s.ids(), s.arms(), [], []

    def tile(excerpts: range, variants: range) -> Any:
        calls.append((len(excerpts), len(variants)))
        try:
            if s.dry and len(calls) == 1:
                raise torch.OutOfMemoryError("by hand")
            chosen = arms[variants.start : variants.stop]
            rows = measure_pass(adapter, ids[excerpts.start : excerpts.stop], chosen, torch.float32, batched=True)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            raise
        return rows.assign(excerpt=rows["excerpt"] + excerpts.start, variant=rows["variant"] + variants.start)

    whole = measure_pass(adapter, ids, arms, torch.float32, batched=True)
    if not s.dry:
        used = torch.cuda.memory_allocated()
        peak = torch.cuda.max_memory_allocated()
        release()
        allowed = used + 0.4 * (peak - used)
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    import pandas as pd

    rows = pd.concat(in_halves(tile, range(len(ids)), range(len(arms))), ignore_index=True)
    difference = compared(rows, whole)
    numbers = difference | {"tiles": calls, "failures": failures}
    if not failures:
        raise AssertionError("the device had room for the whole tile")
    if not difference["off relative_mu"] <= 1e-4:
        raise AssertionError(said(difference))
    return f"{len(failures)} failures ({failures[0][:60]}), {len(calls)} tiles; {said(difference)}", numbers


def killed(s: Setting) -> Found:
    """Two processes on one card, of which one is killed when the first rows are there; continued by one, against one alone."""
    from lscollapse.core.progress import SILENT
    from lscollapse.core.run_folder import RunFolder
    from lscollapse.experiments.paper import sweep_variants
    from lscollapse.runs.loading import load_tasks
    from lscollapse.runs.memory import release
    from lscollapse.runs.processes import measure_on
    from lscollapse.runs.schedule import Schedule
    from lscollapse.runs.work import WorkerError

    model = str(s.checkpoint) if s.dry else "mamba2-tiny"
    config = s.config(models=[model], random_init=True, certified_exit=False)
    tasks = [task.alone for task in load_tasks(config, sweep_variants, SILENT)]
    release()

    def schedule(name: str) -> tuple[RunFolder, Any]:
        folder = RunFolder(s.scratch / name, {"step": "killed"})
        return folder, Schedule(tasks, folder, SILENT)

    folder, plan = schedule("two")
    shots = []

    def keep(item: Any, rows: Any) -> Any:
        folder.add(item.key, rows)
        more = plan.after(item)
        if not shots:
            shots.append(multiprocessing.active_children()[0].pid)
            os.kill(shots[0], signal.SIGKILL)
        return more

    try:
        measure_on([f"{s.device}{'' if s.dry else ':0'}"] * 2, plan.first(), config, keep)
    except WorkerError as error:
        said_so = str(error)
    else:
        raise AssertionError("a killed process was not noticed")
    folder.close()
    done, continued = _alone(*schedule("two"), config)
    every, whole = _alone(*schedule("one"), config)
    difference = compared(_numbered(continued), _numbered(whole))
    if not difference["off relative_mu"] <= 1e-4:
        raise AssertionError(said(difference))
    numbers = difference | {"error": said_so, "items": every, "items left": done}
    return f"{every - done} of {every} items kept; {said(difference)}", numbers


def _alone(folder: Any, plan: Any, config: Any) -> tuple[int, Any]:
    """What is missing, measured in this process: how many items that was, and the finished table."""
    from lscollapse.runs.work import Worker

    left, worker, done = plan.first(), Worker(config), 0
    while left:
        item = left.pop(0)
        folder.add(item.key, worker.rows(item))
        left, done = [*plan.after(item), *left], done + 1
    return done, folder.finish(plan.keys, {})


def _numbered(rows: Any) -> Any:
    """A finished table with its arms numbered, as `compared` asks for."""
    arms = rows["init"].astype(str) + rows["arm"].astype(str) + rows["lam"].astype(str)
    return rows.assign(variant=arms)


def monitor(s: Setting) -> Found:
    """A training with MonitorCallback on and off: the same bits in the end, and what it takes."""
    import torch

    from lscollapse.instrument.trainer import MonitorCallback

    _trained(s, None)
    off, plain = _trained(s, None)
    callback = MonitorCallback(s.ids(4)[:, :16] % 64, every=1 if s.dry else 15)
    on, watched = _trained(s, callback)
    pairs = zip(plain.parameters(), watched.parameters(), strict=True)
    equal = all(torch.equal(one, other) for one, other in pairs)
    numbers = {"off": off, "on": on, "measurements": len(callback.history), "equal": equal}
    each = 1e3 * (on - off) / len(callback.history)
    if not equal:
        # Additions of some backward passes have no fixed order on a GPU, with or without the callback.
        again = _trained(s, None)[1]
        same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
        if same:
            raise AssertionError("the trained weights differ with the callback, and do not without")
        return f"{each:.1f} ms a measurement; this training has not the same bits twice", numbers
    return f"{each:.1f} ms a measurement, {len(callback.history)} of them; trained weights equal to the bit", numbers


def _trained(s: Setting, callback: Any) -> tuple[float, Any]:
    """Seconds of some steps of a small Mamba-2, with a callback or None, and the model."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, TrainerControl, TrainerState

    width, layers, steps = (32, 2, 4) if s.dry else (256, 12, 60)
    sizes = {
        "hidden_size": width,
        "num_heads": width // 16,
        "head_dim": 32,
        "state_size": 16,
        "num_hidden_layers": layers,
    }
    torch.manual_seed(0)
    model: Any = Mamba2ForCausalLM(
        Mamba2Config(vocab_size=64, pad_token_id=0, n_groups=1, expand=2, chunk_size=16, **sizes)
    )
    model.to(s.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    state, control = TrainerState(), TrainerControl()

    def run() -> None:
        for step in range(1, steps + 1):
            ids = torch.randint(0, 64, (8, 32), generator=generator).to(s.device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step = step
            if callback is not None:
                callback.on_step_end(None, state, control, model=model)

    return s.seconds(run)[0], model
