"""The process group of a module whose sequence is sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class SharedGroup:
    """A group that copies of a module share, and that is not saved with it."""

    def __init__(self, group: ProcessGroup | DeviceMesh | None) -> None:
        self.group = group

    def attention(self, *tensors: Any, **options: Any) -> Any:
        """`context_parallel_attention` over the group."""
        from sparse_attn.distributed import context_parallel_attention

        return context_parallel_attention(*tensors, group=self._of_this_process(), **options)

    def attention_to_shared_keys(self, *tensors: Any, **options: Any) -> Any:
        """Of the group's queries to keys that all ranks have."""
        from sparse_attn.distributed.attention import attention_to_shared_keys

        return attention_to_shared_keys(*tensors, group=self._of_this_process(), **options)

    def _of_this_process(self) -> ProcessGroup | DeviceMesh:
        if self.group is None:
            raise ValueError(
                "sparse_attn: expected a module with its context_parallel_group, got one that was "
                "pickled, which loses it"
            )
        return self.group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[type[SharedGroup], tuple[None]]:
        return SharedGroup, (None,)


def own_group(group: ProcessGroup | DeviceMesh | None) -> SharedGroup | None:
    """The group of a module, or None for a module that sees whole sequences."""
    return None if group is None else SharedGroup(group)
