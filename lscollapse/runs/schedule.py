"""The order in which the items of a run can be measured, and what their probes found."""

from __future__ import annotations

import pandas as pd

from lscollapse.core.progress import Progress
from lscollapse.core.run_folder import RunFolder
from lscollapse.core.table import POSITION, UNRESOLVED, lambda_word
from lscollapse.instrument.rounding import Probed, probed
from lscollapse.runs.loading import Task
from lscollapse.runs.work import Item, probes, rest


class Schedule:
    """The items of a run in the order in which they can be measured: of each task the probes, then, by what they find, the rest.

    Attributes:
        found: for each model, in words, the arms that run in float64 and what float32 did not resolve of them.
    """

    def __init__(self, tasks: list[Task], folder: RunFolder, progress: Progress) -> None:
        self.tasks = tasks
        self.folder = folder
        self.progress = progress
        self.probes = [probes(number, task) for number, task in enumerate(tasks)]
        self.rest: dict[int, list[Item]] = {}  # of the tasks whose probes are done
        self.found: dict[str, list[str]] = {}

    @property
    def keys(self) -> list[str]:
        """Of all items, in order; complete when every probe is done."""
        return [item.key for number, items in enumerate(self.probes) for item in [*items, *self.rest.get(number, [])]]

    @property
    def left(self) -> int:
        """How many items are missing, as far as that is known."""
        return sum(not self.folder.has(key) for key in self.keys) + len(self._later())

    def _later(self) -> list[Item]:
        """What is to follow the probes that are not done, should they find nothing."""
        waiting = [(number, task) for number, task in enumerate(self.tasks) if number not in self.rest]
        return [item for number, task in waiting for item in rest(number, task, Probed(task.dtypes))]

    def first(self) -> list[Item]:
        """What is missing and can be measured at once."""
        items = [item for number in range(len(self.tasks)) for item in [*self.probes[number], *self._ready(number)]]
        missing = [item for item in items if not self.folder.has(item.key)]
        if len(missing) < len(items):
            there = len(items) - len(missing)
            self.progress.note(f"{self.folder.path} is continued: {there} of {there + self.left} work items are there")
        self.progress.start(sum(item.cost for item in [*missing, *self._later()]))
        return missing

    def after(self, item: Item) -> list[Item]:
        """What can be measured now that `item` is in the folder."""
        if item.found is not None:
            return []
        return [more for more in self._ready(item.number) if not self.folder.has(more.key)]

    def _ready(self, number: int) -> list[Item]:
        """The rest of a task, where its probes are done."""
        task, made = self.tasks[number], self.probes[number]
        if not all(self.folder.has(item.key) for item in made):
            return []
        rows = pd.concat([self.folder.part(item.key) for item in made], ignore_index=True)
        found = probed(rows)
        self.rest[number] = rest(number, task, found)
        self._tell(task, rows, found)
        return self.rest[number]

    def _tell(self, task: Task, rows: pd.DataFrame, found: Probed) -> None:
        """Say what the probes of a task found, and keep it for the manifest."""
        arms = {int(arm["variant"]): arm for arm in rows.drop_duplicates("variant").to_dict("records")}
        words = {number: f"{arm['arm']}, lambda {lambda_word(arm['lam'])}" for number, arm in arms.items()}
        left = rows[(rows["status"] == UNRESOLVED) & (rows["measure"] != POSITION)]
        widened = {n: arms[n]["why"] for n, dtype in found.dtypes.items() if dtype != task.dtypes[n]}
        flagged = {n: _where(left[left["variant"] == n]) for n in arms if n in set(left["variant"])}
        name = task.info.name + (" (random)" if task.init == "random" else "")
        self.found.setdefault(name, []).extend(
            f"{words[n]}: float64, for float32 leaves {why} open" for n, why in widened.items()
        )
        self.found[name] += [f"{words[n]}: unresolved, {what}" for n, what in flagged.items()]
        if widened:
            which, plan = "; ".join(f"{words[n]} ({why})" for n, why in widened.items()), task.plans.wide
            peak = f", predicted peak {plan.bytes / 2**30:.2f} GiB" if plan and plan.bytes else ""
            self.progress.note(
                f"{name}: {len(widened)} of {len(arms)} arms run in float64, each at about twice the time{peak}, since rounding"
                f" in float32 decides them: {which}"
            )
        if flagged:
            which = "; ".join(f"{words[n]} ({what})" for n, what in flagged.items())
            room = " (there is no room for float64)" if task.dtype == "auto" and task.plans.wide is None else ""
            self.progress.note(
                f"{name}: {len(flagged)} of {len(arms)} arms are marked unresolved where rounding decides them{room}: {which}"
            )


def _where(rows: pd.DataFrame) -> str:
    """What is unresolved of an arm, in words."""
    measures, (dtype, *_) = ", ".join(rows["measure"].unique()), rows["dtype"]
    return f"{measures} in {dtype} from layer {rows['layer'].min()} on"
