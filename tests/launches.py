"""Counts of what a GPU would be asked to do, on a CPU."""

import gc
import threading
import weakref
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from speechbrain_qmargin.head.sizes import Sizes, constants

# of a head with few classes, whose step is a GPU's
FEW_CLASSES = Sizes(
    screen_from=1,
    screen=torch.bfloat16,
    parts=constants(torch.device("cuda")).parts,
    sample=40,
    max_candidates=2**20,
    fused=True,
    screened=512,
    kept=256,
)

FREE = {"view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "t", "transpose", "select"}
FREE |= {"slice", "detach", "alias", "as_strided", "empty", "empty_like", "empty_strided"}
FREE |= {"_reshape_alias", "permute", "new_empty", "reshape", "lift_fresh", "split", "unbind"}
FREE |= {"_sparse_coo_tensor_with_dims_and_tensors", "_local_scalar_dense", "unfold"}
FREE |= {"_values", "_indices", "values", "indices", "is_coalesced", "_nnz", "sparse_dim"}
FREE |= {"dense_dim", "_coalesced_", "_record_function_enter_new", "_record_function_exit"}
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim"}
WAITS |= {"masked_select", "bincount", "unique_consecutive", "repeat_interleave"}


class Counted(TorchDispatchMode):
    """Ops that launch a kernel, Triton's kernels, waits of the host, and bytes at the peak.

    An op counts once, though a sort is several kernels. A read of values (`tolist`, `item`) is one
    wait, and so is whatever has an output whose size depends on values.
    """

    def __init__(self, kernels=()):
        super().__init__()
        self.launches, self.waits, self.names = 0, 0, []
        self.bytes, self.peak = 0, 0
        self._kernels, self._known = kernels, set()
        self._thresholds = gc.get_threshold()

    def __enter__(self):
        for kernel in self._kernels:
            kernel.add_pre_run_hook(self._launched(kernel.fn.__name__))
        self._thresholds = gc.get_threshold()
        gc.set_threshold(20, 2, 2)  # Triton's interpreter keeps its arguments in cycles
        return super().__enter__()

    def __exit__(self, *raised):
        for kernel in self._kernels:
            kernel.pre_run_hooks.pop()
        gc.set_threshold(*self._thresholds)
        return super().__exit__(*raised)

    def _launched(self, name):
        thread = threading.get_ident()  # operators are counted in one thread alone

        def hook(*_, **__):
            if threading.get_ident() == thread:
                self.launches += 1
                self.names.append(name)

        return hook

    def _freed(self, key, size):
        self._known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.waits += name in WAITS
        if name not in FREE:
            self.launches += 1
            self.names.append(name)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if hasattr(tensor, "untyped_storage") and not tensor.is_sparse:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self._known:
                    size = storage.nbytes()
                    self._known.add(key)
                    self.bytes += size
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._freed, key, size)
        return out


@contextmanager
def interpreted():
    """Triton's kernels in its interpreter: quicker, and unseen by :class:`Counted`.

    The interpreter patches Triton's language anew for each launch and for each call of a function
    within a kernel, and makes its table of dtypes for each operation. Here both are done once.
    """
    interpreter, language = (
        import_module("triton.runtime.interpreter"),
        import_module("triton.language"),
    )
    executor, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    rewrite = function.rewrite
    patch, numpy_dtype, run = interpreter._patch_lang, interpreter._get_np_dtype, executor.__call__
    one_at_a_time = threading.RLock()  # whose program it is is the process's, and ranks are threads
    dtypes = {}

    def known_dtype(kind):
        scalar = kind.scalar
        if isinstance(scalar, language.pointer_type):
            return numpy_dtype(kind)
        if scalar not in dtypes:
            dtypes[scalar] = numpy_dtype(scalar)
        return dtypes[scalar]

    def unseen_run(self, *args, **kwargs):
        with one_at_a_time:
            for hook in self.pre_run_hooks:
                hook(*args, **kwargs)
            hooks, self.pre_run_hooks = self.pre_run_hooks, []
            try:
                with _disable_current_modes():
                    return run(self, *args, **kwargs)
            finally:
                self.pre_run_hooks = hooks

    def rewrite_alone(self):
        with one_at_a_time:  # Python 3.11 builds one syntax tree at a time
            return rewrite(self)

    places = {"tl": language, "core": language.core}  # what functions of kernels call
    patched = patch(SimpleNamespace(__globals__=places))
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)
    interpreter._get_np_dtype, executor.__call__ = known_dtype, unseen_run
    function.rewrite = rewrite_alone
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter._get_np_dtype = patch, numpy_dtype
        executor.__call__, function.rewrite = run, rewrite
        if patched is not None:  # Triton 3.6 patches for good
            patched.restore()
