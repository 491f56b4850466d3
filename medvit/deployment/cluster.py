"""The studies of a batch on a Ray cluster that is there: its workers read and predict, this process keeps the ledger.

The workers must see the folder under the same path. Each holds the model and works on one study at a time; what it
answers is delivered here, so that results, ledger and audit are the same as of a run on one machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from medvit.deployment.choice import Listed
from medvit.deployment.options import BatchOptions
from medvit.deployment.work import Answer, failure, judge, prepare
from medvit.inference import Model
from medvit.records import UsageError

PER_WORKER = 2
"""Studies that a worker has or that wait for it: it need not wait for us."""


class Worker:
    """What runs on the cluster: a model, and one study after the other."""

    def __init__(self, shared: tuple[Model, BatchOptions]) -> None:
        self.model, self.options = shared  # which Ray hands over once for each machine

    def answer(self, one: Listed) -> Answer:
        """Read and judge a study; whatever goes wrong is an answer."""
        try:
            return judge(prepare(one, self.model), self.model, draw=self.options.dicom)
        except Exception as error:  # noqa: BLE001  one case never stops a batch; its kind is kept
            return failure(one.case, error)


def ray_answers(due: Iterator[Listed], model: Model, options: BatchOptions) -> Iterator[tuple[Listed, Answer]]:
    """Pairs of a study and what became of it, as they are done.

    A worker that dies is started again and gets its study once more; a study that ends two of them is set aside.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
    """
    ray = _connected()
    shared = ray.put((model, options))
    actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=1)(Worker)
    workers = [actor.remote(shared) for _ in range(max(1, int(ray.cluster_resources().get("CPU", 1))))]
    places = [worker for _ in range(PER_WORKER) for worker in workers]
    # places first: once they are gone, no study more is taken from the list
    pending = {worker.answer.remote(one): (one, worker) for worker, one in zip(places, due, strict=False)}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        one, worker = pending.pop(done)
        for following in islice(due, 1):
            pending[worker.answer.remote(following)] = following, worker
        yield one, _answer(ray, one, done)


def _answer(ray: Any, one: Listed, done: Any) -> Answer:
    try:
        answer: Answer = ray.get(done)
    except ray.exceptions.RayError as error:
        return failure(one.case, error)
    return answer


def _connected() -> Any:
    try:
        import ray  # noqa: PLC0415  an extra
    except ImportError:
        raise UsageError('--engine ray needs Ray: pip install "medvit[ray]".') from None
    if not ray.is_initialized():
        try:
            # what libraries log on the workers may name patients
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            raise UsageError(
                "--engine ray: no Ray cluster is running. Start one (ray start --head) or set RAY_ADDRESS."
            ) from None
    return ray
