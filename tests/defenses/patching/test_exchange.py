"""Drawing other layers than those of a projection."""

from collections import Counter
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses.patching.exchange import ExchangedLayers
from stayaligned.defenses.safe_lora import SafeLora


def reports(norms: dict[str, float]) -> dict[str, LayerReport]:
    return {
        name: LayerReport(
            module=name, similarity=i / 100, shrinkage=0.0, selected=True, update_norm=norm, delta_norm=1.0
        )
        for i, (name, norm) in enumerate(norms.items())
    }


@pytest.mark.parametrize("match", ["count", "norm", "kind"])
def test_every_layer_is_drawn_equally_often(match: Any) -> None:
    found = reports({f"layers.{i}.{kind}": 1.0 for i in range(5) for kind in ("a", "b")})
    chosen = frozenset([*found][:4])
    draws = [ExchangedLayers(SafeLora(), "random", match, seed).exchange(chosen, found) for seed in range(3000)]
    counts = Counter(name for one in draws for name in one)
    assert all(len(one) == 4 for one in draws)
    assert all(abs(counts[name] / 3000 - 0.4) < 0.05 for name in found), counts  # five standard errors


def test_layers_of_the_same_kinds_leave_the_same_norm_or_are_refused() -> None:
    found = reports({f"layers.{i}.a": 0.5 + i for i in range(40)})
    exchanged = ExchangedLayers(SafeLora(), "random", "kind", 0)
    middle, largest = frozenset([*found][10:30]), frozenset([*found][20:])
    left = sum(found[name].update_norm ** 2 for name in found.keys() - exchanged.exchange(middle, found))
    assert left**0.5 == pytest.approx(
        sum(found[name].update_norm ** 2 for name in found.keys() - middle) ** 0.5, rel=0.02
    )
    with pytest.raises(StayalignedError, match="none of 10000 random choices"):
        exchanged.exchange(largest, found)
