"""Everything about the package stands in setup.cfg; here, that `pip install .` leaves no build/ in a clone."""

import atexit
import shutil
import tempfile

from setuptools import setup

base = tempfile.mkdtemp(prefix="koff-build-")
atexit.register(shutil.rmtree, base, ignore_errors=True)
setup(options={"build": {"build_base": base}})
