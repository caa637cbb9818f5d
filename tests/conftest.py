"""For every test: generated cases have no time limit of their own, as machines may be loaded."""

import os

from hypothesis import settings

if not os.environ.get("CI"):  # there hypothesis takes its profile for CI, which has none either
    settings.register_profile("anykvm", deadline=None)
    settings.load_profile("anykvm")
