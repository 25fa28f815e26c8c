"""Tasks: the meaning of a network's outputs. Each task is one file that needs only numpy, so that apps can use it."""

from __future__ import annotations

from evm_deploy._util.text import one_of
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.tasks.detection import DETECTION
from evm_deploy.tasks.raw import FEATURES, RAW
from evm_deploy.tasks.task import Task

TASKS: tuple[Task, ...] = (CLASSIFICATION, DETECTION, FEATURES, RAW)


def get_task(name: str) -> Task:
    """Return the task `name`. Raises UsageError listing all tasks."""
    tasks = {task.name: task for task in TASKS}
    return tasks[one_of("task", name, tasks)]


def figure_title(name: str) -> str:
    """Return the name of a score's figure as people write it: `top-1` for top1. An unknown name is its own title."""
    titles = {key: title for task in TASKS if task.score for key, title in task.score.titles.items()}
    return titles.get(name, name)
