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

from lscollapse import MonitorCallback
from lscollapse.instrument.monitor import Watch, monitor
from tests.equivalence import tiny
from tests.unit.instrument.test_lm_loss import gpt2, mamba2

PROBE = tiny.ids(3, 10, seed=9)
MEANS = ("relative_mu", "rank1_residual", "angular_mu", "angular_rank1_residual", "row_norm_ratio")


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


def by_definition(Y: np.ndarray) -> dict[str, float]:
    """The measures that are watched, of one (N, d) matrix."""
    norms = np.sqrt((Y**2).sum(1))
    of = {"": Y, "angular_": Y / norms[:, None]}
    found = {
        "row_norm_ratio": norms.max() / np.median(norms),
        "longest_row": int((norms >= (1 - 2**-10) * norms.max()).argmax()),
    }
    for kind, Z in of.items():
        sigma = np.linalg.svd(Z, compute_uv=False)
        found[f"{kind}mu" if kind else "relative_mu"] = np.linalg.norm(Z - Z.mean(0)) / np.linalg.norm(Z)
        found[f"{kind}rank1_residual"] = np.sqrt((sigma[1:] ** 2).sum() / (sigma**2).sum())
    return found


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
        each = [by_definition(Y) for Y in X.double().numpy()]
        for name in MEANS:
            assert values[f"{name}/{layer:02d}"] == pytest.approx(np.mean([one[name] for one in each]), rel=1e-5)
        positions = [one["longest_row"] for one in each]
        assert positions.count(values[f"longest_row/{layer:02d}"]) == max(map(positions.count, positions))
    assert set(values) == {"step", "collapse", *(f"{n}/{k:02d}" for n in (*MEANS, "longest_row") for k in range(4))}
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
    for name in (*MEANS, "longest_row"):
        assert float(lines[-1][name]) == pytest.approx(callback.history[-1][f"{name}/03"], rel=1e-5)


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


def test_a_file_from_before_there_were_measures_of_directions(tmp_path: Path) -> None:
    file = tmp_path / "collapse.csv"
    file.write_text("step,layer,relative_mu,rank1_residual\n0,0,0.9,0.8\n0,1,0.7,0.6\n4,0,0.5,0.4\n")
    Watch(PROBE, file=file).begin(tiny.bert(), 4, first=True)
    lines = file.read_text().splitlines()
    assert lines[0] == "step,layer," + ",".join((*MEANS[:4], "row_norm_ratio,longest_row"))
    assert lines[1:3] == ["0,0,0.9,0.8,,,,", "0,1,0.7,0.6,,,,"]
    assert [line[:4] for line in lines[3:]] == ["4,0,", "4,1,", "4,2,", "4,3,"]


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
    assert before["collapse"] == 0 and before.warning == ""
    found = {}
    for share in np.linspace(0, 1, 21):
        values = monitor(mixed(float(share)), PROBE, step=7)
        s = 1 - share
        assert values["relative_mu/02"] <= 1.02 * s * r / np.sqrt(r**2 * s**2 + 1 - r**2) + 1e-12
        lowest = min(values[f"{name}/{layer:02d}"] for name in MEANS[:2] for layer in (1, 2, 3))
        found[values["collapse"]] = values
        assert values["collapse"] == (2 if lowest < 0.5 else 1 if lowest < 0.6 else 0)
    assert set(found) == {0, 1, 2}
    assert found[1].warning.startswith("step 7: rank collapse is near: lowest relative_mu ")
    assert found[2].warning.startswith("step 7: rank collapse: lowest relative_mu 0.000 at layer ")
    assert "(collapsed under 0.5, warning under 0.6)" in found[2].warning

    watch = Watch(PROBE)
    with caplog.at_level(logging.INFO, "lscollapse"):
        for step, share in enumerate((0.0, 1.0, 1.0, 0.0, 1.0)):
            watch.look(mixed(share), step, first=True)
    assert [record.message[:6] for record in caplog.records] == ["step 1", "step 4"]  # where it gets worse


class Longer(Mixing):
    """Mixing, after which one row of each excerpt, another or the same, is made longer."""

    def __init__(self, share: float, rows: list[int], times: float = 100.0) -> None:
        super().__init__(share)
        self.rows, self.times = rows, times

    def forward(self, X: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        Y = super().forward(X).clone()
        Y[range(len(Y)), self.rows] *= self.times
        return Y


def with_last(block: nn.Module) -> Any:
    model = tiny.bert()
    model.encoder.layer[2] = block
    return model


def test_one_long_row_does_not_make_a_healthy_net_collapse() -> None:
    values = monitor(with_last(Longer(0.0, [3, 3, 3])), PROBE)
    plain = monitor(with_last(Mixing(0.0)), PROBE)
    assert values["rank1_residual/03"] < 0.1 < 0.6 < plain["rank1_residual/03"]
    assert values["longest_row/03"] == 3 and 50 < values["row_norm_ratio/03"] < 200
    for name in ("angular_mu/03", "angular_rank1_residual/03"):
        assert values[name] == pytest.approx(plain[name], rel=1e-6)
    assert values["collapse"] == plain["collapse"] == 0 and values.warning == ""


def test_one_long_row_does_not_hide_a_collapse() -> None:
    """Nine rows u and one 100 u: relative mu is 0.95 (the mean row is 10.9 u), all directions are the same."""
    values = monitor(with_last(Longer(1.0, [3, 3, 3])), PROBE, step=7)
    assert values["relative_mu/03"] == pytest.approx(np.sqrt(1 - 10 * 10.9**2 / (9 + 100**2)), rel=1e-5)
    assert values["row_norm_ratio/03"] == pytest.approx(100, rel=1e-5)
    assert values["collapse"] == 2
    start = "step 7: rank collapse: lowest angular_mu 0.000 at layer 3, angular_rank1_residual 0.000 at layer 3 "
    end = "; token 3 has 100 times the median row norm at layer 3: judged by directions there"
    assert values.warning == start + "(collapsed under 0.5, warning under 0.6)" + end


@pytest.mark.parametrize(
    ("rows", "most", "who"), [([3, 5, 5], 5, "5 in 2 of 3"), ([6, 5, 1], 1, "not the same in all")]
)
def test_the_long_row_is_not_the_same_in_all_excerpts(rows: list[int], most: int, who: str) -> None:
    values = monitor(with_last(Longer(1.0, rows)), PROBE)
    assert values["longest_row/03"] == most
    assert values.warning.endswith(
        f"; one token ({who} outputs) has 100 times the median row norm at layer 3: judged by directions there"
    )


def test_ten_times_the_median_is_not_yet_massive() -> None:
    """Ten rows of one direction: at 9.9 times the median they are judged by relative mu, at 10.1 by directions."""
    below, above = (monitor(with_last(Longer(1.0, [3, 3, 3], times)), PROBE) for times in (9.9, 10.1))
    assert "lowest relative_mu 0.8" not in below.warning and "judged by directions" not in below.warning
    assert "lowest angular_mu 0.000 at layer 3" in above.warning and "token 3 has 10 times" in above.warning


def test_a_row_of_zeros_has_no_direction() -> None:
    """It decides where directions do, and is said to be unknown; where they do not, nothing changes."""
    alone = monitor(with_last(Longer(0.0, [3, 3, 3], times=0.0)), PROBE)
    assert np.isnan(alone["angular_mu/03"]) and alone["collapse"] == 0 and alone.warning == ""
    both = with_last(nn.Sequential(Longer(0.0, [3, 3, 3], times=0.0), Longer(0.0, [5, 5, 5])))
    both.encoder.layer[2].forward = lambda X, *args, **kwargs: nn.Sequential.forward(both.encoder.layer[2], X)
    values = monitor(both, PROBE)
    assert values["collapse"] == 2
    assert "values are no numbers, so that nothing can be said" in values.warning
    assert "angular_mu nan at layer 3" in values.warning and "token 5 has " in values.warning


def test_a_net_whose_values_are_no_numbers_counts_as_collapsed() -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    values = monitor(model, PROBE)
    assert values["collapse"] == 2
    assert "relative_mu nan at layer 2" in values.warning


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every": 0}, "every is 0: give the number of steps"),
        ({"every": 2.5}, "every is 2.5: give the number of steps"),
        ({"on_collapse": 3}, "on_collapse is 3: give a function of the values, or None"),
        ({"stop_at": "soon"}, "stop_at is 'soon': give 'early' or 'collapsed', or None to go on"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonitorCallback(PROBE, **setting)


class Mixes(TrainerCallback):
    """Makes the second block of a net mix its rows, after some step."""

    def __init__(self, model: Any, step: int, share: float) -> None:
        self.step, self.share = step, share
        self.block = model.bert.encoder.layer[1] = Mixing(0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.block.share = self.share


@pytest.mark.parametrize(("stop_at", "share", "last"), [
    (None, 1.0, 8), ("collapsed", 1.0, 4), ("early", 1.0, 4), ("collapsed", None, 8), ("early", None, 4),
])  # fmt: skip
def test_the_training_ends_where_it_collapses(
    stop_at: str | None, share: float | None, last: int, tmp_path: Path
) -> None:
    """After step 3 rows are mixed: fully, or so that relative mu is between 0.5 and 0.6."""
    model = bert()
    mixes = Mixes(model, 3, 1.0)
    for mixes.share in np.linspace(0, 1, 101) if share is None else [share]:
        mixes.block.share = mixes.share
        if 0.54 < monitor(model, PROBE)["relative_mu/02"] < 0.56:
            break
    mixes.block.share = 0.0
    one = trainer(model, tmp_path, steps=8, sink=mixes, learning_rate=0.0)
    called: list[Any] = []
    callback = MonitorCallback(PROBE, every=2, stop_at=stop_at, on_collapse=called.append).attach(one)
    one.train()
    assert one.state.global_step == last == callback.history[-1]["step"]
    assert [values["collapse"] for values in callback.history[:2]] == [0, 0]
    assert {values["collapse"] for values in callback.history[2:]} == {1 if share is None else 2}
    assert (
        one.state.log_history[-2]["collapse"] == callback.history[-1]["collapse"]
    )  # the last is of the whole training
    assert called == ([] if share is None else callback.history[2:3])


def test_your_function_is_called_where_the_net_newly_collapses() -> None:
    called: list[Any] = []
    watch = Watch(PROBE, on_collapse=called.append)
    for step, share in enumerate((1.0, 1.0, 0.0, 1.0)):
        watch.look(mixed(share), step, first=True)
    watch.begin(mixed(1.0), 4, first=True)  # another training
    assert [values["step"] for values in called] == [0, 3, 4]
    assert all("rank collapse: lowest relative_mu" in values.warning for values in called)


def test_what_your_function_raises_ends_the_training(tmp_path: Path) -> None:
    model = bert()
    one = trainer(model, tmp_path, steps=8, sink=Mixes(model, 3, 1.0))

    def give_up(values: dict[str, float]) -> None:
        raise RuntimeError(f"at step {values['step']}")

    MonitorCallback(PROBE, every=2, file=tmp_path / "collapse.csv", on_collapse=give_up).attach(one)
    with pytest.raises(RuntimeError, match="at step 4"):
        one.train()
    assert (tmp_path / "collapse.csv").read_text().splitlines()[-1].startswith("4,3,")


def test_a_net_that_starts_collapsed_takes_at_most_one_step(tmp_path: Path) -> None:
    model = bert()
    model.bert.encoder.layer[1] = Mixing(1.0)
    one = trainer(model, tmp_path, steps=8)
    callback = MonitorCallback(PROBE, every=2, stop_at="collapsed").attach(one)
    one.train()
    assert one.state.global_step <= 1 and [values["step"] for values in callback.history] == [0]


def test_steps_that_go_by_two_or_stand_still() -> None:
    watch = Watch(PROBE, every=3)
    watch.begin(tiny.bert(), 0, first=False)
    measured = []
    for step in (0, 2, 4, 4, 6, 8, 8, 10):
        if watch.due(step):
            watch.look(tiny.bert(), step, first=False)
            measured.append(step)
    assert measured == [4, 6, 10] and watch.history == []  # another process measures


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


TWO = """
import sys, torch
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments
from lscollapse import MonitorCallback

class Flat(torch.nn.Module):
    def forward(self, X, *args, **kwargs):
        return X.mean(1, keepdim=True).expand_as(X)

class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            kwargs["model"].bert.encoder.layer[1].register_forward_hook(lambda block, args, out: Flat()(out))

torch.manual_seed(0)
model = BertForMaskedLM(BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(99, (80, 16)).tolist()]
arguments = TrainingArguments(
    "out", max_steps=9, per_device_train_batch_size=2, logging_steps=5, report_to="none", use_cpu=True, save_strategy="no")
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Breaks()])
callback = MonitorCallback(torch.randint(99, (4, 16)), every=2, file="collapse.csv", stop_at="collapsed").attach(trainer)
trainer.train()
steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
Path(f"done{arguments.process_index}").write_text(f"{trainer.state.global_step} {len(callback.history)} {steps}")
"""


def test_two_processes_stop_together(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done0").read_text() == "4 3 [2, 4]"
    assert (tmp_path / "done1").read_text() == "4 0 [2, 4]"
