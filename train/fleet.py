"""Several hosts that share a list of images: each takes the next one, and failed images go back to the others."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Protocol

from ..l2p_core.dataset.images import BrokenImage
from ..l2p_core.dataset.synthesis import PlannedImage, read_image
from .host_client import HostClient, HostGone, HostRefused, ImageFailed, Stopped
from .workflow import Workflow

if TYPE_CHECKING:
    from PIL import Image

IN_FLIGHT = 2
"""Workflows queued on a host at once: one runs while the other's image is fetched and written."""
ATTEMPTS = 3
"""How often an image may fail before it is given up, and how often in a row a host may fail."""
RETURNS = 10
"""How often in a row a host may disappear and return without producing an image."""
_LOOK = 0.2  # seconds between checks whether the user wants to stop
_GRACE = 10.0  # seconds that a stop waits for hosts, which may not answer, to cancel their work

Note = Callable[[str], None]


class Receiver(Protocol):
    """A folder that receives images: of a data set, or of a benchmark."""

    @property
    def todo(self) -> Sequence[PlannedImage]:
        """The images still to be generated."""
        ...

    def write(self, item: Any, image: Image.Image) -> None:
        """Add an image; `item` is one of `todo`."""
        ...


class Fleet:
    """The hosts that generate images.

    Args:
        hosts: one or more.
        workflow: generates an image from a prompt and a seed.
        patience: seconds to wait for a host that does not answer.
        note: shows a sentence to the user.
    """

    def __init__(self, hosts: Sequence[HostClient], workflow: Workflow, patience: float, note: Note):
        self._hosts, self._workflow, self._patience, self._note = hosts, workflow, patience, note
        self._lock = threading.Condition()
        self._todo: deque[PlannedImage] = deque()
        self._open = 0
        self._attempts: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._went: Counter[str] = Counter()
        self._given_up: dict[str, str] = {}
        self._away: set[str] = set()
        self._made: Queue[tuple[PlannedImage, bytes, HostClient]] = Queue()
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def make(self, made: Receiver, wanted_stop: Callable[[], bool]) -> Iterator[PlannedImage]:
        """Generate the missing images; yields each image's item once it is written.

        Raises:
            ValueError: when no host is left, or images could not be made; the finished ones are written.
            KeyboardInterrupt: once `wanted_stop` is true and the work of the hosts that answer has been cancelled.
        """
        self._todo.extend(made.todo)
        self._open = len(self._todo)
        hosts = [host for host in self._hosts for _ in range(IN_FLIGHT)]
        workers = [threading.Thread(target=self._work, args=(host,), daemon=True) for host in hosts]
        for worker in workers:
            worker.start()
        try:
            while True:
                if wanted_stop():
                    raise KeyboardInterrupt
                working = any(worker.is_alive() for worker in workers)
                try:
                    item, content, host = self._made.get(timeout=_LOOK)
                except Empty:
                    if working:
                        continue
                    break
                if self._write(made, item, content, host):
                    yield item
        finally:
            self._stop.set()
            self._wake()
            until = time.monotonic() + _GRACE
            for worker in workers:
                worker.join(max(0.0, until - time.monotonic()))
        self._complain(made)

    def _write(self, made: Receiver, item: PlannedImage, content: bytes, host: HostClient) -> bool:
        try:
            image = read_image(content)
        except BrokenImage as error:
            self._failed(host, item, f"its image cannot be read: {error}")
            return False
        if image.getbbox() is None:
            # Image encoders write NaN as black; no real scene is 0 in every pixel.
            self._failed(host, item, "its image is entirely black, as when a model's values overflow")
            return False
        made.write(item, image)
        with self._lock:
            self._in_a_row[host.name] = self._went[host.name] = 0
            self._open -= 1
        self._wake()
        return True

    def _complain(self, made: Receiver) -> None:
        if self._error:
            raise self._error
        missing = len(made.todo)
        if missing:
            reasons = "; ".join(dict.fromkeys(self._given_up.values()))
            images = "1 image" if missing == 1 else f"{missing} images"
            raise ValueError(f"{images} could not be made ({reasons}). Start again to make the rest.")

    def _work(self, host: HostClient) -> None:
        """Runs in a thread: the images of one host, until all are done or the host is given up."""
        try:
            while (item := self._take(host)) is not None:
                self._try(host, item)
        except Stopped:
            return
        except BaseException as error:
            # A bug of ours stops all work and is raised in the main thread.
            self._error = error
            self._stop.set()
            self._wake()

    def _try(self, host: HostClient, item: PlannedImage) -> None:
        try:
            content = host.make(self._workflow.filled(item.prompt, item.seed), self._stop.is_set)
        except HostGone as error:
            self._give_back(item)
            self._wait_for(host, str(error))
        except HostRefused as error:
            self._give_back(item)
            self._give_up(host, f"{host.name} does not accept the workflow: {error}")
        except ImageFailed as error:
            self._failed(host, item, str(error))
        else:
            self._made.put((item, content, host))

    def _take(self, host: HostClient) -> PlannedImage | None:
        """The next image; waits while others may still return some. None when nothing is left."""
        with self._lock:
            while not self._todo and self._open and not self._is_over(host):
                self._lock.wait()
            return None if self._is_over(host) or not self._todo else self._todo.popleft()

    def _is_over(self, host: HostClient) -> bool:
        return self._stop.is_set() or host.name in self._given_up

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _give_back(self, item: PlannedImage) -> None:
        with self._lock:
            self._todo.appendleft(item)
            self._lock.notify_all()

    def _failed(self, host: HostClient, item: PlannedImage, reason: str) -> None:
        """An image failed: it is tried again after the others, and given up after `ATTEMPTS`."""
        with self._lock:
            self._attempts[item.name] += 1
            self._in_a_row[host.name] += 1
            too_often = self._in_a_row[host.name] >= ATTEMPTS
            if self._attempts[item.name] < ATTEMPTS:
                self._todo.append(item)
            else:
                self._given_up[item.name] = reason
                self._open -= 1
            self._lock.notify_all()
        self._note(f"{host.name} failed at {item.name}: {reason}")
        if too_often:
            self._give_up(host, f"{host.name} failed {ATTEMPTS} times in a row, last: {reason}")

    def _give_up(self, host: HostClient, reason: str) -> None:
        with self._lock:
            new = host.name not in self._given_up
            self._given_up.setdefault(host.name, reason)
            self._lock.notify_all()
        if new:
            self._note(reason)

    def _wait_for(self, host: HostClient, reason: str) -> None:
        """Wait for a missing host within the patience; then it is given up."""
        with self._lock:
            self._went[host.name] += 1
            too_often, new = self._went[host.name] > RETURNS, host.name not in self._away
            self._away.add(host.name)
            others = {other.name for other in self._hosts} - self._away - self._given_up.keys()
        if new:
            self._note(f"{reason}; {'the other hosts take over its images' if others else 'waiting for it'}")
        end = time.monotonic() + self._patience
        while self._open and not self._is_over(host):
            if host.is_there() and not too_often:
                with self._lock:
                    self._away.discard(host.name)
                return
            if too_often or time.monotonic() > end:
                self._give_up(host, reason)
            self._stop.wait(min(1.0, self._patience / 4))
