"""The tree operations of EAGLE's speculative decoding: draft step, build, mask, verify, commit (docs/eagle.md)."""

from sparse_attention.eagle.build import assemble_tree, build, build_tree
from sparse_attention.eagle.commit import commit
from sparse_attention.eagle.draft import cumulative_topk, logsoftmax_topk
from sparse_attention.eagle.kv_cache import append, retrieve
from sparse_attention.eagle.mask import tree_mask
from sparse_attention.eagle.optimize import eagle_hits, optimize_eagle, restore_eagle
from sparse_attention.eagle.outputs import Committed, DraftTree, Frontier, TopK, Verified, empty_tree
from sparse_attention.eagle.paths import trim_retrieve_indices
from sparse_attention.eagle.philox import uniforms
from sparse_attention.eagle.profile import Profile
from sparse_attention.eagle.select import select_tree
from sparse_attention.eagle.static import EAGLE1_MC_SIM_7B_63, TreeBuffers, generate_tree_buffers
from sparse_attention.eagle.verify_greedy import verify_greedy
from sparse_attention.eagle.verify_sampling import verify_sampling
from sparse_attention.eagle.views import accepted_tokens, engines_view, upstream_view

__all__ = [
    "Committed",
    "DraftTree",
    "EAGLE1_MC_SIM_7B_63",
    "Frontier",
    "Profile",
    "TopK",
    "TreeBuffers",
    "Verified",
    "accepted_tokens",
    "append",
    "assemble_tree",
    "build",
    "build_tree",
    "commit",
    "cumulative_topk",
    "eagle_hits",
    "empty_tree",
    "engines_view",
    "generate_tree_buffers",
    "logsoftmax_topk",
    "optimize_eagle",
    "restore_eagle",
    "retrieve",
    "select_tree",
    "tree_mask",
    "trim_retrieve_indices",
    "uniforms",
    "upstream_view",
    "verify_greedy",
    "verify_sampling",
]
