"""Tasks: the meaning of a network's outputs. One file a task, numpy alone, so that apps have them too."""

from __future__ import annotations

from evm_deploy._util.text import one_of
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.tasks.raw import FEATURES, RAW
from evm_deploy.tasks.task import Task

TASKS: tuple[Task, ...] = (CLASSIFICATION, FEATURES, RAW)


def get_task(name: str) -> Task:
    """The task of this name. Raises UsageError listing all of them."""
    tasks = {task.name: task for task in TASKS}
    return tasks[one_of("task", name, tasks)]
