"""The tool that takes out waits: it must find them all, and take out nothing else."""

import pytest

import mutations


@pytest.mark.parametrize("family", ["fwd", "bwd"])
def test_each_call_is_taken_out_once(family):
    found = [(mutation.header, mutation.line) for mutation in mutations.mutations(family)]
    expected = [
        (str(header.relative_to(mutations.KERNELS)), number)
        for header in mutations.headers(family)
        for number, line in enumerate(header.read_text().splitlines(), 1)
        if mutations.calls_for_order(line)
    ]
    assert found == expected


@pytest.mark.parametrize("family", ["fwd", "bwd"])
def test_nothing_else_is_taken_out(family):
    for mutation in mutations.mutations(family):
        old, new = mutation.change.old.splitlines(), mutation.change.new.splitlines()
        assert len(old) == len(new)
        assert [number for number, lines in enumerate(zip(old, new, strict=True), 1) if lines[0] != lines[1]] == [
            mutation.line
        ]
        before, after = old[mutation.line - 1], new[mutation.line - 1]
        assert after.endswith(";") and before.startswith(after[:-1])
        assert before.count("{") - before.count("}") == after.count("{") - after.count("}")
