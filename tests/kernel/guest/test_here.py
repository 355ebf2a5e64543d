"""The lab itself."""

import os


def test_this_is_the_kernel_that_was_asked_for(kernel):
    assert os.getpid() > 1
    assert kernel >= (6, 1)
