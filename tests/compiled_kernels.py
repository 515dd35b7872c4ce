"""Compiles the head's and the loss's Triton kernels for an H100, without a GPU; prints their names.

In a process of its own: where Triton's interpreter is on, nothing can be compiled.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speechbrain_qmargin.head.kernels import KERNELS
from speechbrain_qmargin.head.row_kernels import KERNELS as ROW_KERNELS
from speechbrain_qmargin.head.solve_kernels import KERNELS as SOLVE_KERNELS
from speechbrain_qmargin.loss.kernels import KERNELS as LOSS_KERNELS

DOUBLES = ["prior", "length", "slack", "cosine", "log_q", "values", "levels", "cosines", "slope"]
DOUBLES += ["shown", "lows", "highs", "parts"]
INTEGERS = ["state", "counts", "peaks", "kept", "entries", "ordered", "flags", "numbered"]
LONGS = ["labels", "found", "starts", "order"]
FLOATS = ["raw", "weight", "residual", "out", "cuts", "shares", "loss", "posterior"]
FLOATS += ["support", "inverse_norm"]
TYPES = dict.fromkeys(DOUBLES, "*fp64") | dict.fromkeys(INTEGERS, "*i32")
TYPES |= dict.fromkeys(LONGS, "*i64") | dict.fromkeys([*FLOATS, "upstream"], "*fp32")
TYPES |= {"rounded": "*bf16", "products": "*bf16", "sampled": "*bf16", "factor": "fp32"}
# arguments of one name and several types
OTHERS = {
    "_solve": {"residual": "*fp64"},
    "_finish": {"residual": "*fp64"},
    "_exchange": {"out": "*fp64"},
    "_exact_cosines": {"out": "*fp64"},
    "_write_segments": {"rows": "*i64"},
    "_report": {"out": "*i64"},
    "_weight_gradient": {"rows": "*i64"},
}
CONSTANTS = {"BLOCK_B": 128, "BLOCK_D": 512, "BLOCK_I": 16, "BLOCK": 1024}
CONSTANTS |= {"CHUNK": 1024, "POWER": 4, "HAS_Q": False, "IN_LOGS": False}
CONSTANTS |= {"LANES": 128, "SHOWN": 128, "FIRST": True, "FINAL": True, "SAFEGUARDED": False}

# of rows
OF_ROWS = dict.fromkeys(["values", "momentum", "mean", "square"], "*fp32")
OF_ROWS |= {"rows": "*i64", "since": "*i32", "table": "*fp64", "screen": "*bf16"}
NUMBERS = ["lr", "mu", "decay", "kept", "gain", "fade", "gain_of_square", "eps", "rate", "root_c2"]
OF_ROWS |= dict.fromkeys(NUMBERS, "fp32")
CONSTANTS |= {"BLOCK_R": 4, "ALL": False, "SCREENED": True, "GLIDE": True, "MARK": True}
CONSTANTS |= {"KEPT": True, "MOMENTUM": True, "NESTEROV": True, "DECAY": True}

# as they are launched at D = 512, and the other branches
OWN = {"_exact_cosines": {"BLOCK_D": 128}, "_sample_floors": {"BLOCK": 16384}}
OWN |= {"_embedding_gradient": {"BLOCK_I": 64}}
OWN |= {name: {"CHUNK": 512} for name in ("_solve", "_exchange", "_finish")}
WARPS = {"_sample_floors": 16, "_embedding_gradient": 16}
OTHER = {"POWER": 0, "HAS_Q": True, "IN_LOGS": True, "FINAL": False, "SAFEGUARDED": True}
OTHER |= {
    "FIRST": False,
    "ALL": True,
    "SCREENED": False,
    "GLIDE": False,
    "MARK": False,
    "KEPT": False,
    "MOMENTUM": False,
}

# of the loss: a row in registers in float32, then pieces of one in float64 with all it may be given
OF_LOSS = dict.fromkeys(["cosines", "moved", "prior", "log_q", "factors", "out"], "*fp32")
OF_LOSS |= dict.fromkeys(["alpha_bits", "scale_bits", "limit_bits"], "i64")
OF_LOSS |= {"targets": "*i64", "places": "*i32", "kept": "*fp64"}
CONSTANTS |= {"DTYPE": tl.float32, "RESIDENT": True, "SOFTMAX": False, "SAFE": False}
CONSTANTS |= dict.fromkeys(["Q", "MOVED", "PRIOR", "CHECK", "SUPPORT"], False)
OTHER |= {"DTYPE": tl.float64, "RESIDENT": False, "SAFE": True}
OTHER |= dict.fromkeys(["Q", "MOVED", "PRIOR", "CHECK", "SUPPORT"], True)

for kernel in (*KERNELS, *SOLVE_KERNELS, *ROW_KERNELS, *LOSS_KERNELS):
    name = kernel.fn.__name__
    rooms = {**dict.fromkeys(ROW_KERNELS, OF_ROWS), **dict.fromkeys(LOSS_KERNELS, OF_LOSS)}
    types = TYPES | OTHERS.get(name, rooms.get(kernel, {}))
    names = [p.name for p in kernel.params if p.is_constexpr]
    signature = {
        p.name: "constexpr" if p.is_constexpr else types.get(p.name, "i32") for p in kernel.params
    }
    variants = [{}, OTHER] if OTHER.keys() & set(names) else [{}]
    if kernel in LOSS_KERNELS:
        variants.append({"SOFTMAX": True, "POWER": 0, "IN_LOGS": True, "Q": True, "SUPPORT": True})
    for branches in variants:
        given = CONSTANTS | OWN.get(name, {}) | branches
        source = ASTSource(
            fn=kernel, signature=signature, constexprs={one: given[one] for one in names}
        )
        options = {"num_warps": WARPS.get(name, 4)}
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(name)
