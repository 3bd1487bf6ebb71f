"""What `python -m mhc_mlx.models --sites` and `--random` measure, of every family."""

import json
import types
from pathlib import Path

import mlx.core as mx
import pytest
from programs.figures import refused

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its models are not tested")
from benchmarks import sites as page
from mhc_mlx import launch
from mhc_mlx.models import __main__ as command
from mhc_mlx.models import graph, times
from mhc_mlx.models.families import ROWS, named

ROOT = Path(__file__).parents[2]
FAMILIES = [row.file for row in ROWS]


def site(family: str, d: int = 64, bits: int | None = None):
    (found,) = times.random_sites(d, 1, named("test", family), bits)
    return found


# Rows of C that one site moves, by hand. Stock by op, in bfloat16, where a float32 row counts as
# two: x to float32 4 + 8, its rms_norm 8 + 8, the projection 8, what is read 8 + 8, 8 + 2, 2 + 1,
# its norm 1 + 1 (67 together); then Hy4's write-back: y to float32 1 + 2, times post 2 + 8, the sum
# 8 + 8 + 8, to bfloat16 8 + 4. Patched: x and u of the read 5, x, y and out of the write-back 9,
# and where they are two ops u's norm 2.
# Qwen's by op: x to float32 4 + 8, its square 8 + 8, the mean 8, times its root 8 + 8, times the
# weight 8 + 8, to bfloat16 8 + 4 (80 together); the products 4 + 4 + 4; the gates 4 + 4, times s
# 4 + 4 + 4, the sum 4 + 1, over n 1 + 1; y times h_post 1 + 4, the sum 4 + 4 + 4. Patched: x, y,
# out and s 13, logits, s and u 9, the products 8, of which 4 bits make 12.
@pytest.mark.parametrize(
    "family, patched, by_op",
    [
        ("lm_deepseek_v41", 14, 220),
        ("vlm_deepseek_v41", 14, 220),
        ("vlm_deepseek_v4", 16, 67 + 3 + 10 + 16 + 24 + 12),
        ("vlm_hy_v4", 16, 67 + 3 + 10 + 24 + 12),
        ("vlm_xing4_0", 16, 108),
        ("vlm_qwen4_exp", 13 + 9 + 8, 80 + 12 + 8 + 12 + 5 + 2 + 5 + 12),
        ("vlm_qwen4_exp, 4 bits", 13 + 9 + 12, 80 + 12 + 8 + 12 + 5 + 2 + 5 + 12),
    ],
)
def test_rows_of_c(family, patched, by_op):
    one = site(family.split(",")[0], 128, 4 if "bits" in family else None)
    assert graph.rows_of_kernels(one, mx.bfloat16) == patched
    found = graph.rows_of_package(one, mx.bfloat16)
    assert found["by op"] == by_op
    assert patched < found["compiled"] < by_op


@pytest.mark.parametrize("family", ["lm_deepseek_v41", "vlm_xing4_0"])
def test_a_trace_has_what_is_dispatched(family, monkeypatch):
    """These packages compile nothing in a site, and have nothing twice, which a trace drops."""
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: graph.one_primitive(x))
    sites = times.random_sites(64, 3, named("test", family))
    chains = times._chains(sites, mx.bfloat16, graph.TOKENS)
    trace = graph.package_trace(sites[0], mx.bfloat16)
    counted = graph.dispatches(chains[sites[0].family.package])["dispatches"]
    assert len(trace.launching) == counted


# By hand. V4, one token: x to float32, rms_norm, projection, the kernel, norm, then x to float32
# (mlx-vlm compiles the rest), the product and one fused op. Up to 8 tokens it projects one by one
# and writes back in a kernel; beyond 256 it projects tiles of 256. Both then join the parts.
@pytest.mark.parametrize(
    "family, tokens, stock, kernels",
    [
        ("lm_deepseek_v41", 1, 25, 2),
        ("vlm_deepseek_v4", 1, 8, 3),
        ("vlm_deepseek_v4", 8, 2 + 8 + 1 + 1 + 1 + 1, 3),
        ("vlm_deepseek_v4", 2048, 2 + 8 + 1 + 2 + 3, 2),
        ("vlm_hy_v4", 1, 22, 3),
        ("vlm_xing4_0", 1, 157, 3),
        ("vlm_qwen4_exp", 1, 16, 2),
        ("vlm_qwen4_exp", 2048, 16, 2),
    ],
)
def test_dispatches_in_metals_form(family, tokens, stock, kernels):
    sites = times.random_sites(64, 3, named("test", family))
    before = [getattr(m, name) for m, name, _ in sites[0].family.metal_kernels()]
    found = times._metal_dispatches(sites, mx.bfloat16, tokens)
    assert found[sites[0].family.package] == stock
    assert found["patched, kernels"] == kernels
    after = [getattr(m, name) for m, name, _ in sites[0].family.metal_kernels()]
    assert before == after, "the package's own functions are back"


def test_metals_form_of_patched_sites(monkeypatch):
    """It is what is dispatched here, with other kernels."""
    sites = times.random_sites(64, 3, named("test", "vlm_hy_v4"))
    monkeypatch.setattr(times.launch, "backend", lambda: "cuda")
    counts = {"primitives": 20, "dispatches": 9, "kernels": 4}
    monkeypatch.setattr(times.graph, "dispatches", lambda run: counts)
    monkeypatch.setattr(times.graph, "launched", lambda *a: [None] * 3)
    assert times._metal_dispatches(sites, mx.bfloat16, 1)["patched"] == 9 - 4 + 3


@pytest.mark.parametrize("family", ["vlm_deepseek_v41", "vlm_deepseek_v4"])
def test_large_streams_meet_cold_caches(family, monkeypatch):
    """Between two sites a stand-in runs, which changes no value, and its own time is taken off."""
    sites = times.random_sites(64, 4, named("test", family))
    calls, results = [], []
    usual = times._Spacer.__call__

    def counted(self, before, site):
        calls.append(1)
        found = usual(self, before, site)
        for a, b in zip(found.arrays, site.arrays, strict=True):
            assert mx.array_equal(a, b).item()
        return found

    def seconds(run):
        calls.clear()
        results.append(run())
        mx.eval(results[-1])
        return 4.0 * len(results)

    def beyond(run, alone):
        calls.clear()
        mx.eval(alone())
        assert calls == [1] * 4
        return 2.0, seconds(run)

    monkeypatch.setattr(times._Spacer, "__call__", counted)
    monkeypatch.setattr(times, "CACHE", 1 << 16)
    monkeypatch.setattr(times, "_seconds", seconds)
    monkeypatch.setattr(times, "_seconds_beyond", beyond)
    found = times.site_times(sites, mx.bfloat16, 9)
    assert not calls and "stand-in" not in found and len(results) == 3, "of small streams"
    plain = results[:]
    results.clear()
    monkeypatch.setattr(times, "SMALL", 9 * 4 * 64 * 2 - 1)
    found = times.site_times(sites, mx.bfloat16, 9)
    assert calls == [1] * 4 and len(results) == 3
    assert found == {
        **{"tokens": 9, "stand-in": 0.5},
        **{"patched": 1.0, "mlx-vlm": 2.0, "mlx-vlm, compiled": 3.0},
    }
    for (out, u), (plain_out, plain_u) in zip(results, plain, strict=True):
        assert mx.array_equal(out, plain_out).item() and mx.array_equal(u, plain_u).item()
    monkeypatch.setattr(times._Spacer, "__call__", usual)
    # the results of a chain wait for the product before each site
    with_products = times._chains(sites, mx.bfloat16, 9, times._Spacer())
    for name, run in times._chains(sites, mx.bfloat16, 9).items():
        products = [launch.primitives(*f())["Matmul"] for f in (with_products[name], run)]
        assert products[0] - products[1] == 4, name


def test_the_stand_in_is_taken_off(monkeypatch):
    """By medians of seven pairs, after two that warm up."""
    now, calls = [0.0], []
    monkeypatch.setattr(times, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(name, seconds):
        def run():
            calls.append(name)
            now[0] += 100.0 if len(calls) < 5 else 50.0 if len(calls) < 9 else seconds
            return mx.zeros(1)

        return run

    assert times._seconds_beyond(takes("run", 5.0), takes("alone", 2.0)) == (2.0, 3.0)
    assert calls == ["alone", "run"] * 9


@pytest.mark.parametrize(
    "kind, more",
    [
        *((k, []) for k in ("vlm_deepseek_v41", "vlm_deepseek_v4", "vlm_hy_v4", "vlm_qwen4_exp")),
        ("vlm_qwen4_exp", ["--bits", "4"]),
    ],
)
def test_sites_of_a_family(kind, more, tmp_path, capsys, monkeypatch):
    """Every number of the tables is there, and the tables are made of the file alone."""
    file, markdown = tmp_path / "sites.json", tmp_path / "page.md"
    monkeypatch.setattr(times, "_seconds", lambda run: mx.eval(run()) or 1e-3)
    options = ["--family", kind, "--chain", "3", "--tokens", "1,3", *more]
    command.main(["--sites", "64", *options, "--json", str(file)])
    errors = capsys.readouterr().err
    assert "sites of 64" in errors, "a bar of progress"
    (part,) = json.loads(file.read_text())["per sublayer"]
    assert part["ok"] and part["sites"] == 3 and part["family"] == kind
    assert part.get("bits") == (int(more[1]) if more else None)
    assert list(part["graph"]) == list(part["Metal's form"]) == ["1", "3"]
    begin, end = page.MARK.format(name="sites"), "<!-- end of sites -->"
    markdown.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    page.main([str(file), "--markdown", str(markdown)])
    text = markdown.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n")
    name = page.MODELS[kind] + (f", {more[1]} bits" if more else "")
    counts = part["graph"]["3"]
    counts = [counts[k]["dispatches"] for k in ("patched", "mlx-vlm", "mlx-vlm, compiled")]
    assert f"| {name} | 64 | 3 | 333 us | - | 333 us, 1.0 x | 333 us, 1.0 x |" in text
    assert ", ".join(map(str, counts)) in text and "old" not in text
    assert text.count("\n| " + name) == 3


def test_the_page_has_the_tables_of_its_reports():
    files = sorted((ROOT / "benchmarks/results/h200").glob("sites_*.json"))
    reports = [json.loads(file.read_text()) for file in files]
    text = (ROOT / "docs/models.md").read_text()
    assert len(files) == 4 and page.write(text, page.tables(reports)) == text
    slowdowns = [
        t["patched, not compiled"] / t["patched"]
        for report in reports
        for part in report["per sublayer"]
        for t in part["times"]
    ]
    assert (
        f"{min(slowdowns):.1f}\n# to {max(slowdowns):.1f} times"
        in (ROOT / "mhc_mlx/models/run.py").read_text()
    )


def test_bits_are_of_linear_layers(capsys):
    """Which mHC has none of; MLX quantises to some numbers of bits, and whole groups of weights."""
    for options, message in (
        ("--sites 64 --family vlm_hy_v4 --bits 4", "be None where sites have no linear layers"),
        ("--sites 64,66 --family vlm_qwen4_exp --bits 4", "d must be a multiple of 16 with bits"),
        ("--sites 64 --family vlm_qwen4_exp --bits 7", "must be one of (2, 3, 4, 5, 6, 8) but"),
        ("--sites 64 --family vlm_qwen4_exp --bits 2,4", "--bits must be one number but is '2,4'"),
        ("--random 64 --bits 4", "--bits goes with --sites alone"),
    ):
        assert message in refused(command.main, options.split(), capsys)
    with pytest.raises(TypeError, match=r"\[bench_sites\] bits must be an int or None but got str"):
        times.bench_sites(64, family="vlm_qwen4_exp", bits="4")


def test_tables_are_of_reports_of_sites(tmp_path, capsys):
    file = tmp_path / "a.json"
    report = {"device": "d", "mlx": "1", "date": "d", "command": "c"}
    for wrong, message in (
        ({}, "it has no sites"),
        ({"per sublayer": [{"family": "x"}]}, "its sites lack 'd'"),
    ):
        file.write_text(json.dumps(report | wrong))
        assert message in refused(page.main, [str(file)], capsys)
    with pytest.raises(ValueError, match="must be a page with <!-- sites: written by"):
        page.write("no marks", "text")


@pytest.mark.parametrize(
    "family, kind", [(row.file, kind) for row in ROWS for kind in row.models.split(", ")]
)
def test_random_models(family, kind):
    """They have bfloat16 and 4-bit weights, logits that are not constant, and every site."""
    of = named("test", family)
    model = command._random_model(of, kind, 64, 2)
    assert len([s for s in of.sites(model) if s.kind != "head"]) == 4
    assert of.dtype(model) == mx.bfloat16
    assert any("Quantized" in type(m).__name__ for m in model.modules())
    cast = family in ("vlm_xing4_0", "vlm_qwen4_exp")  # mlx-vlm casts these
    dtype = mx.bfloat16 if cast else mx.float32
    assert {site.arrays[0].dtype for site in of.sites(model)} == {dtype}
    logits = of.logits(model, mx.array([[1, 2, 3]]), of.cache(model)).astype(mx.float32)
    assert logits.shape == (1, 3, of.vocabulary(model))
    assert mx.isfinite(logits).all().item() and mx.var(logits, axis=-1).min().item() > 1e-3
    other = of.logits(model, mx.array([[1, 2, 4]]), of.cache(model)).astype(mx.float32)
    assert not mx.array_equal(logits[:, -1], other[:, -1]).item()


def test_the_command_makes_the_model_that_is_asked_for(monkeypatch):
    made = []
    family = types.SimpleNamespace(new_model=lambda *a: made.append(a) or 1 / 0)
    monkeypatch.setattr(command, "named", lambda op, file: family)
    for options, want in (
        ("--random 64", (64, 3, "deepseek_v41")),
        ("--random 32,2 --family vlm_deepseek_v4 --kind glm5_next", (32, 2, "glm5_next")),
    ):
        with pytest.raises(ZeroDivisionError):
            command.main(options.split())
        assert made.pop() == want
