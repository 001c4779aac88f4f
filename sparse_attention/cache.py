"""A cache of large objects that is bounded by their bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock


def cached_by_bytes(limit: int) -> Callable:
    """Decorator for functions of hashable positional arguments whose results have `nbytes`.

    Results are kept, the last used ones first, while their sum is at most `limit`; the latest is always kept. What a
    result makes for itself later (a transpose) is not counted.
    """

    def decorate(make):
        held: OrderedDict = OrderedDict()
        lock = Lock()
        total = 0

        @wraps(make)
        def get(*args):
            nonlocal total
            with lock:
                if args in held:
                    held.move_to_end(args)
                    return held[args]
            made = make(*args)
            with lock:
                if args not in held:
                    held[args] = made
                    total += made.nbytes
                while total > limit and len(held) > 1:
                    total -= held.popitem(last=False)[1].nbytes
                return held.get(args, made)

        return get

    return decorate
