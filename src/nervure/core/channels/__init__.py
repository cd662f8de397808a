"""Which slices of a network's parameters must be cut together, and cutting them."""

from nervure.core.channels.graph import ChannelGraph
from nervure.core.channels.groups import Group, Keep, Pinned, Slice
from nervure.core.channels.saving import rebuild, recipe

__all__ = ["ChannelGraph", "Group", "Keep", "Pinned", "Slice", "rebuild", "recipe"]
