"""Replays, by the real command line on real servers. A package, so that its tests share one fleet and no others do."""
