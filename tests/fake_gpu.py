"""A GPU's clock without a GPU."""

import math

import torch

from sparse_tickets.timing import Contender

CPU = torch.device("cpu")
LATER = math.inf


class FakeTimer:
    """A clock that runs on by what contenders say they take; graphs are twice as fast."""

    def __init__(self, refuses=(), spoiled_by=()):
        self.now = 0.0
        self.refuses, self.spoiled_by, self.spoiled = refuses, spoiled_by, False

    def contender(self, name, seconds, error=0.0, **options):
        def run():
            self.now += seconds

        run.contender = name
        return Contender(name, run, None if error is None else lambda: error, **options)

    def clock(self):
        return self.now, self.now

    def cold(self, run):
        began = self.now
        run()
        return 3 * (self.now - began)

    def capture(self, run):
        self.spoiled |= run.contender in self.spoiled_by
        if run.contender in (*self.refuses, *self.spoiled_by):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay():
            began = self.now
            run()
            self.now = began + (self.now - began) / 2

        return replay
