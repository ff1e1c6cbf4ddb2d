"""The cache of an engine that has not played yet."""


def cache_of(engine):
    """Returns the engine's cache, which the first dispatch would make."""
    if engine._memory.cache is None:
        engine._memory.cache = engine._programs.new_cache(engine.config.cache_buckets[0])
    return engine._memory.cache
