"""Reading and writing a cache leaves Python's garbage collector as it was."""

import gc

import pytest

from fp8tune.errors import CacheError
from fp8tune.store.cache_file import pack, unpack
from fp8tune.store.contents import Contents


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_also_after_an_error(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        unpack(pack(Contents()))
        assert gc.isenabled() is enabled
        with pytest.raises(CacheError, match="found no JSON"):
            unpack(b"{")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
