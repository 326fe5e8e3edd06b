"""Tests for the pretended device alone: collected where ``-p pretend`` has put it in place."""

import sys

collect_ignore_glob = [] if "pretend" in sys.modules else ["*"]
