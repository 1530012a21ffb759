"""The state of a `Cache` and how it is written; the mathematics is in `ops.cache_rows`."""
