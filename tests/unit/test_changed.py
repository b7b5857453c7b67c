"""`make check`: which unit tests are nearest to what changed."""

from __future__ import annotations

from tests.changed import ALWAYS, BUDGET_S, NEAREST, imported, nearest


def test_a_module_is_run_by_those_that_import_it_and_little_else() -> None:
    module = "phi3_dist.data.pack.bin_packing"
    imports = {f"tests/unit/test_{n}.py": {module, *(f"phi3_dist.other_{m}" for m in range(n))} for n in range(9)}
    imports["tests/unit/test_none.py"] = {"phi3_dist.data"}
    found = nearest(["phi3_dist/data/pack/bin_packing.py", "README.md"], imports, {})
    assert found == (sorted([ALWAYS, *(f"tests/unit/test_{n}.py" for n in range(NEAREST))]), [])


def test_a_changed_test_file_is_run_and_a_package_is_its_init() -> None:
    imports = {"tests/unit/test_a.py": {"phi3_dist.config"}, "tests/unit/test_b.py": {"phi3_dist.data"}}
    assert nearest(["tests/unit/test_b.py"], imports, {}) == (["tests/unit/test_b.py", ALWAYS], [])
    assert nearest(["phi3_dist/config/__init__.py"], imports, {}) == (["tests/unit/test_a.py", ALWAYS], [])
    assert nearest(["tests/ranks/test_c.py", "phi3_dist/x.json"], imports, {}) == ([ALWAYS], [])


def test_a_module_that_no_test_imports_is_run_by_those_of_the_modules_that_import_it() -> None:
    verbs, app = "tests/unit/test_verbs.py", "tests/unit/test_app.py"
    imports = {verbs: {"phi3_dist.cli"}, app: {"phi3_dist.app"}}
    package = {
        "phi3_dist.cli": {"phi3_dist.cli.generate_and_eval"},
        "phi3_dist.app": {"phi3_dist.cli"},
        "phi3_dist.alone": set(),
    }
    assert nearest(["phi3_dist/cli/generate_and_eval.py"], imports, {}, package) == (sorted([ALWAYS, verbs]), [])
    assert nearest(["phi3_dist/alone.py"], imports, {}, package) == ([ALWAYS], [])
    assert nearest(
        ["phi3_dist/cli/generate_and_eval.py"], imports, {}, {"phi3_dist.cli.generate_and_eval": {"phi3_dist.cli"}}
    ) == (
        [ALWAYS],
        [],
    )


def test_what_takes_long_is_left_out_and_named_unless_it_is_changed_itself() -> None:
    near, far = "tests/unit/test_near.py", "tests/unit/test_far.py"
    imports = {near: {"phi3_dist.a"}, far: {"phi3_dist.a", "phi3_dist.b"}}
    costs = {ALWAYS: 5.0, near: BUDGET_S - 8, far: 4.0}
    assert nearest(["phi3_dist/a.py"], imports, costs) == (sorted([ALWAYS, near]), [far])
    assert nearest(["phi3_dist/a.py", far], imports, costs) == (sorted([ALWAYS, far]), [near])


def test_imports_inside_functions_count() -> None:
    source = "import phi3_dist.errors\nimport torch\ndef f():\n    from phi3_dist.data.pack import bin_packing as p\n"
    assert imported(source) == {"phi3_dist.errors", "phi3_dist.data.pack", "phi3_dist.data.pack.bin_packing"}
