"""Imports run without the collector of cycles, and work with it."""

import gc
import subprocess
import sys

import pytest

from koff_lightning.support.quick_imports import quick_imports


def test_the_collector_works_again_afterwards_and_stays_off_where_it_was():
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_a_fresh_process_imports_is_kept_out_of_later_collections_and_nothing_else():
    """A notebook holds much else when it calls `main`, some of it garbage that is still to be collected."""
    program = """if True:
        import gc, sys
        sys.argv = ["koff"]  # which imports nothing at once
        from koff_lightning.support.quick_imports import quick_imports
        with quick_imports():
            sys.modules["torch"] = gc
        fresh = gc.get_freeze_count()
        gc.unfreeze()
        with quick_imports():
            pass
        print(fresh > 100, gc.get_freeze_count())"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == ["True", "0"]
