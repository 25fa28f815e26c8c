"""Tasks: the meaning of a network's outputs. Each task is one file that needs only numpy, so that apps can use it."""

from __future__ import annotations

from evm_deploy._util.text import one_of
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.tasks.detection import DETECTION
from evm_deploy.tasks.raw import FEATURES, RAW
from evm_deploy.tasks.segmentation import SEGMENTATION
from evm_deploy.tasks.task import Task

TASKS: tuple[Task, ...] = (CLASSIFICATION, DETECTION, SEGMENTATION, FEATURES, RAW)
#: Figures of scores that people are shown, of every task: name in manifests and records -> title
TITLES = {name: title for task in TASKS if task.score for name, title in task.score.titles.items()}


def get_task(name: str) -> Task:
    """Return the task `name`. Raises UsageError listing all tasks."""
    tasks = {task.name: task for task in TASKS}
    return tasks[one_of("task", name, tasks)]
