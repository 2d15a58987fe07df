"""Patterns of hybrids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flags
from hybrids import PLACES, hybrid_pattern


@pytest.mark.parametrize(
    "spec, pattern",
    [
        ("inter:1:5:spread", "MMTMMMMMTMMM"),
        ("inter:1:1:spread", "MTMTMTMTMTMT"),
        ("inter:1:3:front", "TTTMMMMMMMMM"),
        ("inter:1:3:middle", "MMMMTTTMMMMM"),
        ("inter:1:12:middle", "MMMMMTMMMMMM"),
        ("intra:1:3:scattered", "MHMMMHMMMHMM"),
        ("intra:1:3:spread", "MHMMMHMMMHMM"),
        ("intra:1:3:clustered", "MMMMHHHMMMMM"),
        ("intra:1:3:sandwich", "HHMMMMMMMMMH"),
    ],
)
def test_twelve_blocks(spec, pattern):
    assert hybrid_pattern(spec, 12) == pattern
    assert flags.parse([f"--hybrid={spec}", "--n_layer=12"])[1]["pattern"] == pattern


@given(a=st.integers(1, 12), b=st.integers(1, 12), n=st.integers(2, 60), data=st.data())
def test_any_ratio(a, b, n, data):
    kind = data.draw(st.sampled_from(sorted(PLACES)))
    place = data.draw(st.sampled_from(PLACES[kind]))
    pattern = hybrid_pattern(f"{kind}:{a}:{b}:{place}", n)
    letter = "H" if kind == "intra" else "T"
    k = pattern.count(letter)
    assert len(pattern) == n and k + pattern.count("M") == n and 0 < k < n
    assert abs(k - n * a / (a + b)) <= 0.5 or k in (1, n - 1)
    if place in ("spread", "scattered"):
        where = [i for i, other in enumerate(pattern) if other == letter]
        gaps = [j - i for i, j in zip(where, where[1:], strict=False)]
        assert where[0] > 0 and (not gaps or max(gaps) - min(gaps) <= 1)


WRONG = ["", "inter", "inter:1:5", "inter:1:5:sandwich", "intra:1:5:front", "x:1:1:spread", "inter:0:1:spread"]
WRONG += ["inter:1:-1:spread", "inter:1:1:1:spread", "inter:1:\u00b2:front", "inter:1:" + "9" * 5000 + ":front"]


@pytest.mark.parametrize("spec", WRONG, ids=range(len(WRONG)))
def test_what_is_not_understood(spec):
    with pytest.raises(ValueError, match="write inter:1:5:spread, or another ratio and place"):
        hybrid_pattern(spec, 12)
    with pytest.raises(ValueError, match="needs 2 to 1000 blocks, not n_layer=1$"):
        hybrid_pattern("inter:1:5:spread", 1)


def test_where_the_number_of_blocks_comes_from(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("pattern = 'TTTT'\nn_embd = 32\nn_head = 2\nn_kv_head = 1\n")
    parse = lambda *argv: flags.parse([str(file), *argv])[1]["pattern"]  # noqa: E731
    assert parse("--hybrid=inter:1:1:spread") == "MTMT"
    assert parse("--hybrid=inter:1:1:spread", "--n_layer=6") == "MTMTMT"
    file.write_text("hybrid = 'intra:1:3:scattered'\nn_embd = 32\nn_head = 2\nn_kv_head = 1\n")
    assert parse("--n_layer=4") == "MHMM" and len(parse()) == 24 and parse("--pattern=MT") == "MT"
