"""Values against numpy on transformers' hidden states; that training is not disturbed; a user's own script."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from lscollapse.instrument.monitor import MonitorCallback, monitor, warning
from tests.equivalence import tiny
from tests.unit.instrument.test_lm_loss import gpt2, mamba2

PROBE = tiny.ids(3, 10, seed=9)


class Texts(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        ids = tiny.ids(1, 12, seed=number)[0].tolist()
        return {"input_ids": ids, "labels": ids}


class Sink(TrainerCallback):
    """Stands for TensorBoard or W&B: keeps what the Trainer's log hands on."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.seen.setdefault(state.global_step, {}).update(logs)


def bert() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(tiny.bert(hidden_dropout_prob=0.2).config)


def trainer(model: Any, folder: Path, steps: int, sink: TrainerCallback | None = None, **changes: Any) -> Trainer:
    settings = {
        "max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 3,
        "report_to": "none", "logging_steps": 4, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 1e-3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **settings | changes)
    return Trainer(model, arguments, train_dataset=Texts(), callbacks=[sink] if sink else None)


def by_definition(Y: np.ndarray) -> tuple[float, float]:
    """Relative mu and rank-1 residual of one (N, d) matrix."""
    sigma = np.linalg.svd(Y, compute_uv=False)
    rank1 = np.sqrt((sigma[1:] ** 2).sum() / (sigma**2).sum())
    return float(np.linalg.norm(Y - Y.mean(0)) / np.linalg.norm(Y)), float(rank1)


@pytest.mark.parametrize("make", [bert, gpt2, mamba2], ids=lambda make: make.__name__)
def test_values_are_means_over_excerpts_of_what_transformers_computes(make: Any) -> None:
    model = make()
    values = monitor(model, PROBE, step=40)
    seen: list[Tensor] = []
    base = model.base_model
    blocks = list(
        {"bert": lambda: base.encoder.layer, "gpt2": lambda: base.h}.get(model.config.model_type, lambda: base.layers)()
    )
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    for block in blocks:
        handles.append(
            block.register_forward_hook(lambda _, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        model.eval()(torch.as_tensor(PROBE))
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    for layer, X in enumerate(seen):
        each = np.array([by_definition(Y) for Y in X.double().numpy()])
        assert values[f"relative_mu/{layer:02d}"] == pytest.approx(each[:, 0].mean(), rel=1e-5)
        assert values[f"rank1_residual/{layer:02d}"] == pytest.approx(each[:, 1].mean(), rel=1e-5)
    assert set(values) == {
        "step",
        "collapse",
        *(f"{n}/{k:02d}" for n in ("relative_mu", "rank1_residual") for k in range(4)),
    }
    assert values["step"] == 40


def test_nothing_of_the_model_or_the_random_numbers_changes() -> None:
    model = bert().train()
    model.bert.encoder.layer[1].eval()  # frozen by its owner
    model(torch.as_tensor(PROBE), labels=torch.as_tensor(PROBE)).loss.backward()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    monitor(model, PROBE)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for parameter, (held, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is held and (held is None or torch.equal(held, value))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error() -> None:
    model = bert().train()
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        monitor(model, [[1, 2, 10_000]])
    assert all(module.training for module in model.modules())


def test_training_with_the_callback_ends_with_the_same_bits(tmp_path: Path) -> None:
    weights = []
    for watched in (False, True):
        model = bert()
        one = trainer(model, tmp_path, steps=6)
        if watched:
            callback = MonitorCallback(PROBE, every=2).attach(one)
        one.train()
        weights.append(model.state_dict())
    assert [values["step"] for values in callback.history] == [0, 2, 4, 6]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not torch.equal(
        weights[0]["bert.encoder.layer.0.output.dense.weight"],
        bert().state_dict()["bert.encoder.layer.0.output.dense.weight"],
    )


def test_the_log_of_the_trainer_and_whatever_listens_to_it(tmp_path: Path) -> None:
    """The listener comes before the user's callbacks, as TensorBoard's would; steps 4 and 8 are logged anyway."""
    sink = Sink()
    one = trainer(bert(), tmp_path, steps=8, sink=sink)
    callback = MonitorCallback(PROBE, every=3, file=tmp_path / "collapse.csv").attach(one)
    one.train()
    assert [values["step"] for values in callback.history] == [0, 3, 6]
    for values in callback.history[1:]:
        wanted = {key: value for key, value in values.items() if key != "step"}
        assert wanted.items() <= sink.seen[values["step"]].items()
        logged = [entry for entry in one.state.log_history if entry["step"] == values["step"]]
        assert len(logged) == 1 and wanted.items() <= logged[0].items() and "loss" in logged[0]
    assert "collapse" not in sink.seen[4] and "loss" in sink.seen[4]
    with (tmp_path / "collapse.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert [(line["step"], line["layer"]) for line in lines] == [(str(s), str(k)) for s in (0, 3, 6) for k in range(4)]
    assert float(lines[-1]["relative_mu"]) == pytest.approx(callback.history[-1]["relative_mu/03"], rel=1e-5)
    assert float(lines[-1]["rank1_residual"]) == pytest.approx(callback.history[-1]["rank1_residual/03"], rel=1e-5)


def test_a_training_that_goes_on_continues_the_file(tmp_path: Path) -> None:
    file = tmp_path / "collapse.csv"
    file.write_text("step,layer,relative_mu,rank1_residual\n9,0,1,1\n")  # of another training
    one = trainer(bert(), tmp_path, steps=4, save_strategy="steps", save_steps=4)
    MonitorCallback(PROBE, every=2, file=file).attach(one)
    one.train()
    two = trainer(bert(), tmp_path, steps=6)
    MonitorCallback(PROBE, every=2, file=file).attach(two)
    two.train(resume_from_checkpoint=True)
    steps = [line.split(",")[0] for line in file.read_text().splitlines()]
    assert steps == ["step", *(step for step in "0246" for _ in range(4))]


class Mixing(nn.Module):
    """In the place of attention: every row becomes `share` of the mean row and the rest of itself."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, X: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (1 - self.share) * X + self.share * X.mean(1, keepdim=True)


def mixed(share: float) -> Any:
    model = tiny.bert()
    model.encoder.layer[1] = Mixing(share)
    return model


def test_warning_early_then_collapsed(caplog: pytest.LogCaptureFixture) -> None:
    """Relative mu r of X becomes (1 - s) r / sqrt(r^2 (1 - s)^2 + 1 - r^2) when the share s goes to the mean row."""
    before = monitor(mixed(0.0), PROBE)
    r = before["relative_mu/02"]
    assert before["collapse"] == 0 and warning(before) == ""
    found = {}
    for share in np.linspace(0, 1, 21):
        values = monitor(mixed(float(share)), PROBE, step=7)
        s = 1 - share
        assert values["relative_mu/02"] <= 1.02 * s * r / np.sqrt(r**2 * s**2 + 1 - r**2) + 1e-12
        lowest = min(value for key, value in values.items() if "/" in key and not key.endswith("00"))
        found[values["collapse"]] = values
        assert values["collapse"] == (2 if lowest < 0.5 else 1 if lowest < 0.6 else 0)
    assert set(found) == {0, 1, 2}
    assert warning(found[1]).startswith("step 7: rank collapse is near: lowest relative_mu ")
    assert warning(found[2]).startswith("step 7: rank collapse: lowest relative_mu 0.000 at layer ")
    assert "(collapsed under 0.5, warning under 0.6)" in warning(found[2])

    callback = MonitorCallback(PROBE)
    with caplog.at_level(logging.INFO, "lscollapse"):
        for step, share in enumerate((0.0, 1.0, 1.0, 0.0, 1.0)):
            callback._measure(mixed(share), step)
    assert [record.message[:6] for record in caplog.records] == ["step 1", "step 4"]  # where it gets worse


def test_a_net_whose_values_are_no_numbers_counts_as_collapsed() -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    values = monitor(model, PROBE)
    assert values["collapse"] == 2
    assert "relative_mu nan at layer 2" in warning(values)


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every is 0: give the number of steps"):
        MonitorCallback(PROBE, every=0)


SCRIPT = """
import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments
from lscollapse import MonitorCallback

model = BertForMaskedLM(BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(99, (40, 16)).tolist()]
arguments = TrainingArguments("out", max_steps=4, logging_steps=2, report_to="none", use_cpu=True, save_strategy="no")
trainer = Trainer(model, arguments, train_dataset=data)
MonitorCallback(torch.randint(99, (4, 16)), every=2, file="collapse.csv").attach(trainer)
trainer.train()
"""


def test_a_training_script_of_ten_lines(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "relative_mu/02" in done.stdout and "train_loss" in done.stdout
    assert len((tmp_path / "collapse.csv").read_text().splitlines()) == 1 + 3 * 3
