"""Counts what lives: the bytes of all tensors of this process, beside what torch or the system say of them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of all storages that live, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._sizes = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.count(tensor)
        return out

    def count(self, tensor):
        if is_traceable_wrapper_subclass(tensor):  # a quantised one has no memory but that of its parts
            for name in tensor.__tensor_flatten__()[0]:
                self.count(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, storage):
        self.now -= self._sizes.pop(storage)
