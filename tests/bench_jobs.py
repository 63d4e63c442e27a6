"""Jobs for the processes of ``htsat bench`` whose answers are known; light, for every process imports this."""

import dataclasses
import os

from htsat.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Counter:
    """Says in which process it is, how often it was asked, and fails where it is told to."""

    name: str
    wrong: str = ""

    def start(self):
        if self.wrong == "start":
            raise UsageError(f"{self.name} is not installed")
        if self.wrong == "die":
            os._exit(3)
        count = 0

        def answer(request):
            nonlocal count
            count += 1
            if self.wrong == str(count):
                raise ZeroDivisionError("one line\nand another")
            return os.getpid(), count, request

        return answer
