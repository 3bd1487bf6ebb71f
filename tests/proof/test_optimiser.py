"""Every body's Metal text, compiled by an optimising LLVM and no GPU: a sample of all variants."""

import os

import pytest
from cases import Case

from mhc_mlx import launch
from proof import optimiser
from proof.optimiser import llvm, measure, variants

MAIN, OTHERS = variants.sample()


@pytest.fixture(scope="module")
def sampled() -> tuple[dict, dict]:
    """Variants by case, and the figures of all, compiled together."""
    each = variants.variants(MAIN, OTHERS)
    found = dict.fromkeys(v for launched in each.values() for v in launched)
    return each, optimiser.all_figures(found, os.cpu_count() or 1)


@pytest.mark.parametrize("case", MAIN + OTHERS, ids=str)
def test_nothing_is_left_in_memory_or_narrow(case: Case, need, request):
    need("optimiser")
    each, figures = request.getfixturevalue("sampled")
    assert each[str(case)]
    wrong = {str(v): optimiser.faults(v, figures[v]) for v in each[str(case)]}
    assert not {k: found for k, found in wrong.items() if found}


def test_every_body_is_sampled():
    each = variants.variants(MAIN, OTHERS)
    bodies = {f.stem for f in launch._FOLDERS[1].glob("*.metal")}
    assert {v.body for launched in each.values() for v in launched} == bodies


IR = """
@table = constant [2 x float] zeroinitializer
define dso_local spir_kernel void @entry(i32 noundef %groups, ptr addrspace(1) noundef align 1 \
%x, ptr addrspace(1) %h, ptr addrspace(3) noalias %of_pre) local_unnamed_addr #0 {
entry:
  %array.i = alloca [4 x float], align 4
  %0 = addrspacecast ptr addrspace(1) %x to ptr addrspace(5)
  %1 = addrspacecast ptr addrspace(5) %0 to ptr addrspace(4)
  %2 = getelementptr inbounds i8, ptr addrspace(4) %1, i64 %at
  %3 = addrspacecast ptr addrspace(1) %h to ptr addrspace(4)
  %4 = phi ptr addrspace(4) [ %2, %entry ], [ %6, %loop ]
  %5 = select i1 %c, ptr addrspace(4) %4, ptr addrspace(4) %3
  %6 = getelementptr i8, ptr addrspace(4) %4, i64 16
  %7 = load <4 x i32>, ptr addrspace(4) %4, align 16, !tbaa !1
  %8 = load <8 x i16>, ptr addrspace(4) %5, align 2
  %9 = inttoptr i64 %k to ptr addrspace(1)
  store i16 %v, ptr addrspace(1) %9, align 2
  store <2 x float> <float 0.0, float %f>, ptr addrspace(4) %2, align 8
  %10 = load float, ptr addrspace(3) %of_pre, align 4
  %11 = addrspacecast ptr %array.i to ptr addrspace(4)
  %12 = load float, ptr addrspace(4) %11, align 4
  %13 = load float, ptr addrspace(2) @table, align 4
  call void @llvm.memcpy.p0.p5.i64(ptr noundef nonnull align 16 dereferenceable(16) %array.i, \
ptr addrspace(5) noundef align 2 dereferenceable(16) %0, i64 16, i1 false), !tbaa.struct !2
  ret void
}
define linkonce_odr spir_func void @_ZN3mhc12multiply_runILb1EE(ptr %p) {
  %own = alloca %"struct.mhc::Pack", align 16
  ret void
}
"""


def test_reads_ir():
    assert llvm.accesses(IR) == [
        llvm.Access("load", ("x",), 16),
        llvm.Access("load", ("h", "x"), 2),  # wide, but aligned to 2 bytes
        llvm.Access("store", ("9",), 2),  # nobody knows where
        llvm.Access("store", ("x",), 8),
        llvm.Access("load", ("x",), 2),  # a copy
    ]
    assert llvm.arrays(IR) == ["[4 x float]", '%"Pack"']
    assert llvm.functions(IR) == ["multiply_run"]


ASSEMBLY = """
entry:                                  ; @entry
; %bb.0:
	v_mov_b32_e32 v1, 0
	s_load_b64 s[0:1], s[4:5], null
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
	v_fmac_f32_e32 v1, v2, v3
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
	;;#ASMSTART
	; simd_sum v1 v2
	;;#ASMEND
	v_exp_f32_e32 v1, v2
	s_cbranch_scc1 .LBB0_2
; %bb.3:                                ;   in Loop: Header=BB0_1 Depth=1
	v_add_nc_u32_e32 v1, v2, v3
	s_waitcnt lgkmcnt(0)
	s_cbranch_scc1 .LBB0_1
; %bb.4:
	global_store_b128 v[0:1], v[2:5], off
	s_endpgm
.Lfunc_end0:
"""


def test_counts_instructions_by_depth_of_loops():
    outside, loop, inner = llvm.instructions(ASSEMBLY)
    assert outside == {"moves": 1, "device_loads": 1, "device_stores": 1}
    assert loop == {"fma": 1, "other_alu": 1, "branches": 1}
    assert inner == {"simd_sums": 1, "transcendental": 1, "branches": 1}


def test_narrow_and_split():
    wide, half = llvm.Access("load", ("x",), 16), llvm.Access("load", ("x",), 2)
    eights = [llvm.Access("load", ("x",), 8)] * 2
    assert measure.narrow([wide, half, half]) == ("2 x load x 2",)
    assert measure.split([wide], [*eights, half]) == ()  # two halves of a pack
    (words,) = measure.split([wide, wide], [*eights, half])
    assert words == "load x: packs of 16 bytes in all, where aligned 32"


def test_who_may_spill():
    """A text of a row that models do not have, if it has streams; then it may be a ragged one."""
    line = dict.fromkeys(measure.Figures.__dataclass_fields__, ())
    numbers = dict.fromkeys(("registers", "scratch_bytes", "array_bytes", "code_bytes"), 0)
    figures = measure.Figures(**line | numbers | {"spills": 3})
    for main, pack_bytes, may in (
        (True, 16, False),
        (True, 0, False),
        (False, 0, False),
        (False, 16, True),
    ):
        variant = measure.Variant("body", "", "", 32, pack_bytes, main=main)
        kinds = [f.kind for f in optimiser.all_faults(variant, figures)]
        assert kinds == ([] if may else ["spill"])


def test_streams_are_known():
    """Rows of C channels a token are streams, whatever their name."""
    for case in (c for shape in variants.SAMPLE for c in variants.main_cases(*shape)):
        for one in variants.main_launches(case):
            arrays = (one.inputs | one.outputs).items()
            rows = {k for k, a in arrays if a and a[0][0] == case.tokens and a[0][-1] == case.C}
            assert rows - {"weight", "partial"} <= measure.STREAMS, one.name
