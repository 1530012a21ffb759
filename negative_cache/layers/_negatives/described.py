"""The sources of a task in its configuration, with each tower once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from negative_cache._compat import deserialize, keras
from negative_cache.layers._negatives.base import Negatives


def describe_sources(
    sources: Sequence[Negatives], own_networks: Sequence[Callable]
) -> dict[str, list]:
    """The entries "negatives" and "own_networks" of a configuration.

    Args:
      sources: of a task.
      own_networks: the towers that are theirs and not the task's, each once.
    """
    serialize = keras.utils.serialize_keras_object
    described = []
    for source in sources:
        part = serialize(source)
        if source.is_cache and source.has_own_tower:
            places = [network is source.candidate_network for network in own_networks]
            part["config"]["candidate_network"] = places.index(True)
        described.append(part)
    return {
        "negatives": described,
        "own_networks": [serialize(network) for network in own_networks],
    }


def sources_of(described: Sequence[dict[str, Any]], own_networks: Sequence[Any]) -> list[Negatives]:
    """The inverse of `describe_sources`."""
    networks = [deserialize(part) for part in own_networks]
    return [deserialize(_with_network(part, networks)) for part in described]


def _with_network(described: dict[str, Any], networks: Sequence[Any]) -> dict[str, Any]:
    """A described source with its tower, if that is one of `networks`."""
    place = described["config"].get("candidate_network")
    if not isinstance(place, int):
        return described
    return {**described, "config": {**described["config"], "candidate_network": networks[place]}}
